"""What is trained beside a finished model, which stays as it is.

ControlNets (Zhang et al. 2023, arXiv 2302.05543), LoRAs (Hu et al. 2021, arXiv 2106.09685), textual inversions (Gal
et al. 2022, arXiv 2208.01618).
"""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.data import files, hints, scenes
from minidiff.data.few import SETS
from minidiff.device import default_device
from minidiff.io.lora import save_lora
from minidiff.io.tokenizer import load_tokenizer
from minidiff.io.weights import save_state
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.low_rank import adapt
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import add_word, tokenize
from minidiff.train import losses
from minidiff.train.pictures import dataset, from_bytes, latents, sheet
from minidiff.train.recipes.begin import fitted, seeded
from minidiff.train.trainer import Run, batch_indices, generator, train
from minidiff.values import text, whole

if TYPE_CHECKING:
    from PIL import Image

RANK, VECTORS = 8, 2
PRIOR = 64  # pictures of what must stay
LAYERS = (r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
          r"|conv1|conv2|conv_shortcut)")  # of the U-Net
LOOK = (8, 16, 32, 64)  # channels of the encoder of the hint: narrow, as hints are simple; f = 4 takes three of them


def controlnet_edges(run: Run, *, size: int = 128, data: Path | None = None, init: Path) -> None:
    """ControlNet for edges, thin white lines on black, of mini-sd or of the model in --init."""
    pictures, _ = dataset(run, size, data)
    controlnet("controlnet-edges", run, size, data, init,
               lambda rows: hints.edges(from_bytes(pictures[rows]) / 2 + 0.5))


def controlnet_masks(run: Run, *, size: int = 128, data: Path | None = None, init: Path) -> None:
    """ControlNet for the silhouettes of objects, white on black, of mini-sd or of the model in --init.

    Raises:
        ValueError: a folder (data): only of scenes it is known where the objects are.
    """
    if data:
        raise ValueError("this recipe learns where objects of scenes are; it cannot be trained on a folder (--data)")
    controlnet("controlnet-masks", run, size, data, init, partial(hints.silhouettes, size=size, seed=run.seed))


def controlnet(name: str, run: Run, size: int, data: Path | None, init: Path, hint: Callable[[Tensor], Tensor]) -> None:
    """Train a ControlNet of the model in `init` on hint(rows of the data) -> (B,3,size,size) in [0, 1].

    Half of the prompts are left out, so that the hint has to be read (section 3.3 of the paper).
    """
    means, stds, ids = latents(run, size, data, init)
    run, pipe = fitted(run, len(means)), frozen(run, init)
    unet, encoder, device = pipe.unet, pipe.text.encoders[0], pipe.device
    empty = tokenize(load_tokenizer(init / "tokenizer"), [""])[0]
    net = seeded(lambda: ControlNet.from_unet(unet, LOOK[:pipe.vae.factor.bit_length()]), run.seed)

    def loss(net: ControlNet, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        chosen[torch.rand(len(rows), generator=g) < 0.5] = empty.to(chosen)
        t, eps = torch.randint(pipe.schedule.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        with torch.no_grad():
            context, _ = encoder(chosen.long().to(device))
        look = net.look(hint(rows).to(device))

        def steered(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t, context, residuals=net(x, t, context, hint=look))

        return {"loss": losses.diffusion(steered, pipe.kind, pipe.schedule, z0.to(device), t.to(device),
                                         eps.to(device)).mean()}

    shown = hint(torch.arange(min(8, len(means))))

    def sample(net: ControlNet):
        drawn = pipe([""] * len(shown), controlnet=net, control_image=shown, guidance_scale=1, output="tensor")
        return sheet(torch.cat([shown, drawn.cpu()]) * 2 - 1, len(shown))

    train(name, net, loss, run, batch=run.batch, lr=5e-4, sample=sample).save_pretrained(run.out, dtype=torch.float16)


def lora(run: Run, *, size: int = 128, data: Path | None = None, init: Path, rank: int = RANK,
         text_encoder: bool = False, prior: str | None = None, checkpointing: bool = False) -> None:
    """LoRA of mini-sd, or of the model in --init, from the few captioned pictures in --data: a style, or a thing.

    Writes pytorch_lora_weights.safetensors, which diffusers loads, and kohya.safetensors, for the web UIs. Of the
    U-Net's layers the attention changes, and the convolutions of its blocks; of the text encoder's the attention.

    Args:
        rank: of the changes. text_encoder: whether the text encoder learns too.
        prior: what must stay as it is (DreamBooth's prior preservation, Ruiz et al. 2022, arXiv 2208.12242): a prompt,
            or "scenes" for prompts of all sorts; the model draws PRIOR pictures of it first, and learns them too.
        checkpointing: make the maps inside the U-Net's blocks twice instead of keeping them: slower, in less memory.

    Raises:
        ValueError: no folder (data), or a rank below 1.
    """
    pipe, few, run = begin(run, size, data, init)
    rank = whole("rank", rank, 1, 2**12, f"rank is {rank}; a LoRA has a rank of at least 1")
    kept = own_pictures(pipe, prior, run) if prior is not None else None
    unet, encoder = (net.eval() for net in (pipe.unet, pipe.text.encoders[0]))
    loras = seeded(lambda: {f"unet.{name}": each for name, each in adapt(unet, LAYERS, rank=rank).items()}, run.seed)
    if text_encoder:
        words = seeded(lambda: adapt(encoder, r".*\.(q|k|v|out)_proj", rank=rank), run.seed + 1)
        loras |= {f"text_encoder.{name}": each for name, each in words.items()}
    if checkpointing:
        unet.checkpointing()
    loss = lessons(pipe, few, kept, run, anew=text_encoder)
    own = StableDiffusion.from_pretrained(init, device=pipe.device)     # for pictures: it is changed, and changed back

    def changes(nets: nn.ModuleList) -> dict:
        return {name: each.change() for name, each in zip(loras, nets, strict=True)}

    def sample(nets: nn.ModuleList):
        handle = own.loras.add(changes(nets))
        drawn = few.beside(own)
        own.loras.remove(handle)
        return drawn

    nets = nn.ModuleList(loras.values())
    average = train("lora", nets, loss, run, batch=run.batch, lr=1e-3, ema=0.99, sample=sample)
    save_lora(changes(average), run.out / "pytorch_lora_weights.safetensors", dtype=torch.float16)
    save_lora(changes(average), run.out / "kohya.safetensors", kohya=True, dtype=torch.float16)


def lessons(pipe: StableDiffusion, few: Few, kept: Few | None, run: Run, anew: bool = False) -> Callable:
    """The loss of the U-Net on a few pictures, and as much on what it is to keep; a tenth is told nothing.

    Args:
        anew: read the captions in every step, as the text encoder learns too.
    """
    sets = [few, kept] if kept else [few]
    contexts = [None if anew else pipe.text([*each.captions, ""])[0] for each in sets]

    def loss(_: nn.Module, step: int, share: slice) -> dict[str, Tensor]:
        found = {}
        for name, each, context in zip(("new", "prior"), sets, contexts):
            rows = batch_indices(len(each.captions), run.batch, step, run.seed)[share]
            g = generator(run.seed, step, share.start, *["prior"] * (each is kept))
            told = torch.where(torch.rand(len(rows), generator=g) < 0.1, len(each.captions), rows)
            if context is None:
                read, _ = pipe.text([[*each.captions, ""][row] for row in told.tolist()])
            else:
                read = context[told]
            found[name] = each.loss(pipe, rows, read, g)
        return {"loss": sum(found.values())} | (found if kept else {})

    return loss


def own_pictures(pipe: StableDiffusion, prior: str, run: Run) -> Few:
    """What the model itself draws of a prompt, or of the captions of scenes, as latents: PRIOR of them, or a batch."""
    from tqdm import tqdm

    n = max(PRIOR, run.batch)
    if prior == "scenes":
        _, shown = scenes.render(n, 16, seed=run.seed)
        captions = [scenes.caption(scene) for scene in shown]
    else:
        captions = [text(prior)] * n
    drawn = [pipe(captions[first:first + 8], seed=first, output="latent")
             for first in tqdm(range(0, n, 8), "what stays", unit="batch")]
    mean = torch.cat(drawn)
    return Few(torch.empty(0), captions, mean, torch.zeros_like(mean))


class Word(nn.Module):
    """The vectors of a new word, (n, width)."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)


def inversion(run: Run, *, size: int = 128, data: Path | None = None, init: Path, word: str | None = None) -> None:
    """New word of mini-sd, or of the model in --init: one of the captions of --data, by default that in <brackets>.

    Its vectors alone are trained; they stand beside the table of the text encoder, no row of which is touched. Writes
    learned_embeds.safetensors, diffusers' form, and emb_params.safetensors, AUTOMATIC1111's.

    Args:
        word: the word of the captions that is meant; in prompts it stands in <angle brackets> from then on.

    Raises:
        ValueError: no folder (data), or not one such word in every caption.
    """
    pipe, few, run = begin(run, size, data, init)
    if word is not None:
        word = word.strip("<>")
        few = few._replace(captions=[re.sub(rf"(?<![\w<]){re.escape(word)}(?![\w>])", f"<{word}>", caption)
                                     for caption in few.captions])
    words = [set(re.findall(r"<[^<>\s]+>", caption)) for caption in few.captions]
    if len(set.union(*words)) != 1 or not all(words):
        raise ValueError("each caption has to have the same one new word in angle brackets, as in \"a <thing> on snow\""
                         f"; found are {', '.join(sorted(set.union(*words))) or 'none'}")
    (word,) = words[0]
    tokenizer, encoder = pipe.text.tokenizers[0], pipe.text.encoders[0]
    table = encoder.text_model.embeddings
    known = tokenize(tokenizer, [caption.replace(word, "") for caption in few.captions])
    begun = table.token_embedding.weight.detach()[known.unique()].mean(0)             # an average word of theirs
    add_word(tokenizer, encoder, word, begun.repeat(VECTORS, 1))
    net = Word(table.extra.clone())

    def loss(net: Word, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(few.captions), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        table.extra = 1 * net.vectors
        context, _ = pipe.text([few.captions[row] for row in rows.tolist()])
        return {"loss": few.loss(pipe, rows, context, g)}

    def sample(net: Word):
        table.extra = net.vectors.detach().clone()
        return few.beside(pipe)

    vectors = train("inversion", net, loss, run, batch=run.batch, lr=5e-3, ema=0.99, sample=sample).vectors.detach()
    save_state({word: vectors}, run.out / "learned_embeds.safetensors")
    save_state({"emb_params": vectors}, run.out / "emb_params.safetensors")


class Few(NamedTuple):
    """A handful of pictures (n,3,H,W) uint8, their captions, and the means and deviations of their latents."""

    pictures: Tensor
    captions: list[str]
    mean: Tensor
    std: Tensor

    def loss(self, pipe: StableDiffusion, rows: Tensor, context: Tensor, g: torch.Generator) -> Tensor:
        """The mean loss of these pictures, at random times and with random noise."""
        device = self.mean.device
        z0 = self.mean[rows] + self.std[rows] * torch.randn(self.mean[rows].shape, generator=g).to(device)
        t, eps = torch.randint(pipe.schedule.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        return losses.diffusion(pipe.unet, pipe.kind, pipe.schedule, z0, t.to(device), eps.to(device),
                                context=context).mean()

    def beside(self, pipe: StableDiffusion) -> Image.Image:
        """Returns a PIL picture: the first eight of them, and below what a model makes of their captions."""
        drawn = pipe(self.captions[:8], output="tensor").cpu() * 2 - 1
        return sheet(torch.cat([from_bytes(self.pictures[:8]), drawn]), len(drawn))


def frozen(run: Run, init: Path) -> StableDiffusion:
    """The model that stays as it is.

    Raises:
        ValueError: it has a second text encoder.
    """
    pipe = StableDiffusion.from_pretrained(init, device=run.device or default_device())
    if len(pipe.text.encoders) > 1:
        raise ValueError(f"{init} has two text encoders; these recipes are for models with one")
    for net in (pipe.unet, pipe.vae, pipe.text):
        net.eval().requires_grad_(False)
    return pipe


def begin(run: Run, size: int, data: Path | None, init: Path) -> tuple[StableDiffusion, Few, Run]:
    """The frozen model, the pictures in a folder, and a run whose batch is no larger.

    Raises:
        ValueError: no folder.
    """
    if not data:
        raise ValueError("this is learned from a few pictures with captions: name their folder (--data), or one of the "
                         f"sets that are drawn here: {', '.join(SETS)}")
    pipe = frozen(run, init)
    pictures, captions = zip(*files.stream_folder(data, size))
    if empty := [i for i, caption in enumerate(captions, 1) if not caption.strip()]:
        raise ValueError(f"picture {empty[0]} of {data} has no caption; each needs one that says what it shows")
    pictures = torch.stack(pictures)
    with torch.no_grad():
        mean, logvar = pipe.vae.moments(from_bytes(pictures).to(pipe.device))
    factor = pipe.vae.config.scaling_factor
    return pipe, Few(pictures, list(captions), factor * mean, factor * (0.5 * logvar).exp()), fitted(run, len(pictures))

"""What is trained beside a finished model, which stays as it is.

ControlNets (Zhang et al. 2023, arXiv 2302.05543), LoRAs (Hu et al. 2021, arXiv 2106.09685).
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.data import files, hints
from minidiff.device import default_device
from minidiff.io.lora import save_lora
from minidiff.io.tokenizer import load_tokenizer
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.lora import adapt
from minidiff.schedule import SD
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import tokenize
from minidiff.train import losses
from minidiff.train.pictures import dataset, from_bytes, latents, sheet
from minidiff.train.recipes.begin import fitted, seeded
from minidiff.train.trainer import Run, batch_indices, generator, train

RANK = 8
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
    run, device = fitted(run, len(means)), run.device or default_device()
    pipe = StableDiffusion.from_pretrained(init, device=device)
    unet, text = (net.eval().requires_grad_(False) for net in (pipe.unet, pipe.text.encoders[0]))
    empty = tokenize(load_tokenizer(init / "tokenizer"), [""])[0]
    net = seeded(lambda: ControlNet.from_unet(unet, LOOK[:pipe.vae.factor.bit_length()]), run.seed)

    def loss(net: ControlNet, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        chosen[torch.rand(len(rows), generator=g) < 0.5] = empty.to(chosen)
        t, eps = torch.randint(SD.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        with torch.no_grad():
            context, _ = text(chosen.long().to(device))
        look = net.look(hint(rows).to(device))

        def steered(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t, context, residuals=net(x, t, context, hint=look))

        return {"loss": losses.diffusion(steered, "eps", SD, z0.to(device), t.to(device), eps.to(device)).mean()}

    shown = hint(torch.arange(min(8, len(means))))

    def sample(net: ControlNet):
        drawn = pipe([""] * len(shown), controlnet=net, control_image=shown, guidance_scale=1, output="tensor")
        return sheet(torch.cat([shown, drawn.cpu()]) * 2 - 1, len(shown))

    train(name, net, loss, run, batch=run.batch, lr=5e-4, sample=sample).save_pretrained(run.out, dtype=torch.float16)


def lora(run: Run, *, size: int = 128, data: Path | None = None, init: Path) -> None:
    """LoRA of mini-sd, or of the model in --init, from the few captioned pictures in --data: a style, or a thing.

    Writes pytorch_lora_weights.safetensors, which diffusers loads, and kohya.safetensors, for the web UIs. Only the
    U-Net changes; of its layers the attention, and the convolutions of its blocks.

    Raises:
        ValueError: no folder (data).
    """
    if not data:
        raise ValueError("a LoRA is learned from a few pictures with captions: name their folder (--data)")
    device = run.device or default_device()
    pipe = StableDiffusion.from_pretrained(init, device=device)
    pictures, captions = zip(*files.stream_folder(data, size))
    with torch.no_grad():
        mean, logvar = pipe.vae.moments(from_bytes(torch.stack(pictures)).to(device))
        contexts, _ = pipe.text([*captions, ""])
    mean, std = (pipe.vae.config.scaling_factor * each for each in (mean, (0.5 * logvar).exp()))
    run = fitted(run, len(pictures))
    loras = seeded(lambda: adapt(pipe.unet.eval(), LAYERS, rank=RANK), run.seed)

    def loss(nets: nn.ModuleList, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        z0 = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=g).to(device)
        told = torch.where(torch.rand(len(rows), generator=g) < 0.1, len(pictures), rows)   # some are told nothing
        t, eps = torch.randint(SD.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        return {"loss": losses.diffusion(pipe.unet, "eps", SD, z0, t.to(device), eps.to(device),
                                         context=contexts[told]).mean()}

    own = StableDiffusion.from_pretrained(init, device=device)          # for pictures: it is changed, and changed back

    def changes(nets: nn.ModuleList) -> dict:
        return {f"unet.{name}": each.change() for name, each in zip(loras, nets, strict=True)}

    def sample(nets: nn.ModuleList):
        handle = own.loras.add(changes(nets))
        drawn = own([*captions[:8]], output="tensor")
        own.loras.remove(handle)
        return sheet(torch.cat([from_bytes(torch.stack(pictures[:8])), drawn.cpu() * 2 - 1]), len(drawn))

    nets = nn.ModuleList(loras.values())
    average = train("lora", nets, loss, run, batch=run.batch, lr=1e-3, ema=0.99, sample=sample)
    save_lora(changes(average), run.out / "pytorch_lora_weights.safetensors")
    save_lora(changes(average), run.out / "kohya.safetensors", kohya=True)

"""The recipes of the weights that ship, `python -m minidiff train NAME`: a Stable Diffusion in miniature.

clip and vae learn from drawings, unet from cached latents; all three write parts of one diffusers folder (`--out`).
The others, which the evaluation and the notebooks use, have folders of their own.
"""
from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data import files, scenes
from minidiff.data.drawing import crowd
from minidiff.device import default_device
from minidiff.grid import preset
from minidiff.io.weights import weights_dir
from minidiff.nets.classifier import Classifier, ClassifierConfig
from minidiff.nets.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig
from minidiff.nets.layers import Config
from minidiff.nets.patches import Patches, PatchesConfig
from minidiff.nets.reader import SCENE, THING, Reader, ReaderConfig
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.prediction import denoiser
from minidiff.samplers import ddim
from minidiff.schedule import SD
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import Text, load_tokenizer, tokenize, train_tokenizer
from minidiff.train import losses
from minidiff.train.pictures import (
    DRAWINGS,
    Drawings,
    crops,
    dataset,
    draw,
    latents,
    made_of,
    sheet,
    to_unit,
    tokenize_all,
)
from minidiff.train.trainer import Run, batch_indices, check, digest, generator, train
from minidiff.values import whole

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "timestep_spacing": "leading",
             "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}  # as Stable Diffusion 1.x, with DDIM


def reader(run: Run, *, size: int = 32, data: Path | None = None, init: Path | None = None) -> None:
    """Classifier that reads a drawing's seven attributes back; it measures prompt adherence."""
    if data:
        raise ValueError("the reader learns the attributes of scenes; it cannot be trained on a folder (--data)")
    n, seed = 60_000, run.seed + 1_000_000  # its own drawings, all colour-object pairs
    pictures, drawn = draw(n, size, seed=seed, held_out=None, second=0.3)
    truth = {name: torch.tensor([row[name] for row in map(slots, drawn)]) for name in (*SCENE, *THING)}
    net = start(Reader, ReaderConfig(size=size), run, init, "size")

    def loss(net: Reader, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(n, 128, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        image = to_unit(pictures[rows])
        image = image + 0.15 * torch.rand(len(rows), 1, 1, 1, generator=g) * torch.randn(image.shape, generator=g)
        device = next(net.parameters()).device
        reading = net(image.to(device))
        logits = {**reading.scene, **{name: part.flatten(0, 1) for name, part in reading.thing.items()}}
        return {"loss": sum(F.cross_entropy(logits[name].float(), truth[name][rows].flatten().to(device),
                                            ignore_index=-1) for name in logits)}

    train("reader", net, loss, run, batch=128, lr=1e-3).save_pretrained(run.out, dtype=torch.float16)


def counter(run: Run, *, size: int = 64, data: Path | None = None, init: Path | None = None) -> None:
    """Net that counts the suns, moons and objects of a drawing; the evaluation finds those that nobody asked for."""
    if data:
        raise ValueError("this recipe counts in scenes; it cannot be trained on a folder (--data)")
    config = PatchesConfig(block_out_channels=(16, 32, 64, 96), out_channels=len(COUNTED))
    net = start(Patches, config, run, init, "out_channels")

    def loss(net: Patches, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(DRAWINGS, 64, step, run.seed)[share]
        pictures, counts = zip(*[counted(random.Random(f"{run.seed + 3_000_000} {row}"), size, crowded=row % 2)
                                 for row in rows.tolist()])
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = to_unit(torch.stack(pictures))
        blurred = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2.0, mode="bilinear")  # as a VAE may leave it
        image = torch.lerp(image, blurred, torch.rand(len(rows), 1, 1, 1, generator=g))
        image = image + 0.15 * torch.rand(len(rows), 1, 1, 1, generator=g) * torch.randn(image.shape, generator=g)
        count, truth = net(image.to(device))[0].float().sum((2, 3)), torch.tensor(counts, device=device)
        return {"loss": F.mse_loss(count, truth.float()), "right": (count.round() == truth).all(1).float().mean()}

    train("counter", net, loss, run, batch=64, lr=2e-3).save_pretrained(run.out, dtype=torch.float16)


def counted(rng: random.Random, size: int, *, crowded: bool) -> tuple[Tensor, list[int]]:
    """A drawing (3,size,size) uint8, of a scene with any pair or a crowd, and how many of COUNTED are in it.

    >>> picture, counts = counted(random.Random(1), 16, crowded=False); picture.shape, counts
    (torch.Size([3, 16, 16]), [0, 0, 1])
    """
    if crowded:
        picture, found = crowd(size, rng)
        counts = [found[name] for name in COUNTED]
    else:
        scene = scenes.sample(rng, held_out=None, second=0.3)
        picture, _ = scenes.draw(scene, size, rng)
        counts = [int(scene.sky == "sun"), int(scene.sky == "moon"), 1 + bool(scene.second)]
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), counts


def clip(run: Run, *, size: int = 64, data: Path | None = None, init: Path | None = None) -> None:
    """Tokenizer and CLIP: a text and an image encoder trained contrastively on captioned pictures."""
    pictures, captions = dataset(run, size, data)
    if not (run.resume or init) or not (run.out / "tokenizer" / "vocab.json").is_file():
        train_tokenizer((caption for row in captions[:20_000] for caption in row), run.out / "tokenizer")
    tokenizer = load_tokenizer(run.out / "tokenizer")
    ids = tokenize_all(tokenizer, captions)
    vocabulary = tokenizer.get_vocab_size()
    shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, projection_dim=128)
    text = CLIPTextConfig(vocab_size=vocabulary, eos_token_id=vocabulary - 1, **shape)
    vision = CLIPVisionConfig(image_size=size, patch_size=size // 4, **shape)
    net = start(CLIP, CLIPConfig(text, vision), run, init, "text_config.vocab_size", "vision_config.image_size")
    run = replace(run, made={**run.made, "another vocabulary": digest(run.out / "tokenizer")})

    def loss(net: CLIP, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), 256, step, run.seed)[share]
        wording = torch.randint(ids.shape[1], rows.shape, generator=generator(run.seed, step, share.start))
        chosen = ids[rows, wording]
        longest = int(chosen.argmax(1).max()) + 1  # the mask is causal: what follows the end token changes nothing
        device = next(net.parameters()).device
        caption, image = net(chosen[:, :longest].long().to(device), to_unit(pictures[rows]).to(device))
        hits = (image @ caption.T).argmax(1) == torch.arange(len(rows), device=device)
        return {"loss": losses.contrastive(image, caption, net.logit_scale), "top1": hits.float().mean(),
                "scale": net.logit_scale.exp()}

    average = train("clip", net, loss, run, batch=256, lr=1e-3, weight_decay=0.1)
    average.save_pretrained(run.out / "train" / "clip" / "model")
    average.text_encoder().save_pretrained(run.out / "text_encoder", dtype=torch.float16)


def perceptual(run: Run, *, size: int = 128, data: Path | None = None, init: Path | None = None) -> None:
    """Net that names what crops of drawings show; the VAE compares its maps of two pictures (perceptual loss)."""
    if data:
        raise ValueError("this recipe learns the attributes of scenes; it cannot be trained on a folder (--data)")
    drawings = Drawings(DRAWINGS, size, seed=run.seed)
    config = PatchesConfig(block_out_channels=(16, 32, 64, 96), out_channels=len(NAMES))
    net = start(Patches, config, run, init, "out_channels")

    def loss(net: Patches, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(drawings), 16, step, run.seed)[share]
        pictures, drawn = drawings.shown(rows)
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = to_unit(crops(pictures.repeat(4, 1, 1, 1), size // 2, g)).to(device)
        truth = torch.tensor([[name in (*scene, *(scene.second or ())) for name in NAMES] for scene in drawn])
        truth = truth.repeat(4, 1).to(device)
        logits = net(image)[0].float().mean((2, 3))
        return {"loss": F.binary_cross_entropy_with_logits(logits, truth.float()),
                "right": ((logits > 0) == truth).float().mean()}

    train("perceptual", net, loss, run, batch=16, lr=2e-3).save_pretrained(run.out, dtype=torch.float16)


def vae(run: Run, *, size: int = 64, data: Path | None = None, init: Path | None = None) -> None:
    """KL-VAE on crops; f = 4, above 64 pixels f = 8, with a perceptual loss and, towards the end, a discriminator."""
    large = size > 64
    pictures, _ = dataset(run, size, data)
    shape = dict(block_out_channels=(16, 32, 64, 128), norm_num_groups=8) if large else \
        dict(block_out_channels=(32, 64, 96), norm_num_groups=16)
    config = VAEConfig(sample_size=size, layers_per_block=1, latent_channels=4, **shape)
    net = start(VAE, config, run, init)
    net.config = replace(net.config, scaling_factor=1.0)
    nets = nn.ModuleDict({"vae": net})
    if large:
        nets["critic"] = seeded(lambda: Patches(PatchesConfig()), run.seed)
        eye = Patches.from_pretrained(weights_dir() / "perceptual").to(run.device or default_device())
    batch, side = (8, 64) if large else (32, 32)

    def loss(nets: nn.ModuleDict, step: int, share: slice) -> dict[str, Tensor]:
        net, rows = nets["vae"], batch_indices(len(pictures), batch, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = to_unit(crops(pictures[rows], min(size, side), g)).to(device)
        mean, logvar = (m.float() for m in net.moments(image))
        decoded = net.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g).to(device)).float()
        total = losses.vae(image, decoded, mean, logvar)
        values = {"psnr": 10 * torch.log10(4 / (decoded - image).detach().square().mean())}
        if large:
            critic = nets["critic"].requires_grad_(False)  # it judges here, and learns below
            values["perceptual"] = losses.perceptual(eye(image)[1], eye(decoded)[1])
            total = total + 0.25 * values["perceptual"]
            if step >= 0.6 * run.steps:
                fooled = -critic(decoded)[0].mean()
                total = total + 0.5 * losses.adaptive_weight(total, fooled, net.decoder.conv_out.weight) * fooled
            values["critic"] = losses.hinge(*(critic.requires_grad_(True)(x)[0] for x in (image, decoded.detach())))
            total = total + values["critic"]
        return {"loss": total, **values}

    def sample(nets: nn.ModuleDict):
        net = nets["vae"]
        image = to_unit(pictures[torch.arange(16)]).to(next(net.parameters()).device)
        with torch.inference_mode():
            return sheet(torch.cat([image, net.decode(net.encode(image))]), 8)

    net = train("vae", nets, loss, run, batch=batch, lr=2e-3, sample=sample)["vae"]
    with torch.inference_mode():  # latents that enter the U-Net have unit standard deviation
        z = net.to("cpu").encode(to_unit(pictures[torch.arange(min(len(pictures), 1024))]))
        net.config = replace(net.config, scaling_factor=round(1 / z.std().item(), 5))
    net.save_pretrained(run.out / "vae", dtype=torch.float16)


def unet(run: Run, *, size: int = 64, data: Path | None = None, init: Path | None = None) -> None:
    """Cross-attention U-Net of 7 M parameters on cached latents, with the clip and vae found in --out."""
    for part, recipe in (("text_encoder", "clip"), ("vae", "vae")):
        if not (run.out / part / "config.json").is_file():
            raise FileNotFoundError(f"{run.out} has no {part}; train it first: python -m minidiff train {recipe} "
                                    f"--out {run.out}")
    means, stds, ids = latents(run, size, data)
    text = CLIPText.from_pretrained(run.out / "text_encoder").eval().requires_grad_(False)
    empty = tokenize(load_tokenizer(run.out / "tokenizer"), [""])[0]
    config = UNetConfig(sample_size=means.shape[-1], in_channels=means.shape[1], out_channels=means.shape[1],
                        block_out_channels=(64, 128, 160), layers_per_block=1, heads=4, cross_attention_dim=128,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    net = start(UNet, config, run, init, "in_channels", "out_channels", "cross_attention_dim")
    text.to(run.device or default_device())

    def loss(net: UNet, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), 64, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        chosen[torch.rand(len(rows), generator=g) < 0.1] = empty.to(chosen)  # caption dropout, for guidance
        t, eps = torch.randint(SD.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        with torch.no_grad():
            context, _ = text(chosen.long().to(device))
        each = losses.diffusion(net, "eps", SD, z0.to(device), t.to(device), eps.to(device), context=context)
        return {"loss": each.mean()}

    def sample(net: UNet):
        save_pipeline(net, run.out)
        drawn = StableDiffusion.from_pretrained(run.out, device=str(next(net.parameters()).device))
        return sheet(drawn(PROMPTS, output="tensor") * 2 - 1, 8)

    save_pipeline(train("unet", net, loss, run, batch=64, lr=1e-3, ema=0.9995, sample=sample), run.out)


def pixels(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """U-Net of 2 M parameters on the pixels of small pictures, without prompt or VAE."""
    pictures = files.load_folder(data, size)[0] if data else draw(DRAWINGS, size, seed=run.seed, second=0.0)[0]
    pixel_unet("pixels", run, pictures, None, init)


def pixels_class(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """The pixel model's sibling that is told the object's class, or (in a tenth of the pictures) nothing."""
    pixel_unet("pixels-class", run, *labelled(run, size, data), init)


def classifier(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """Classifier of the object in a noisy picture, for classifier guidance of the pixel model."""
    pictures, labels = labelled(run, size, data)
    config = ClassifierConfig(num_classes=len(OBJECTS), mid_block_type="UNetMidBlock2DCrossAttn", **WAY_DOWN)
    net = start(Classifier, config, run, init, "num_classes", "in_channels")

    def loss(net: Classifier, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), 64, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        x0 = to_unit(pictures[rows])
        t = torch.randint(SD.T, rows.shape, generator=g)
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in SD(t))
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=g)
        logits, y = net(x.to(device), t.to(device)).float(), labels[rows].to(device)
        return {"loss": F.cross_entropy(logits, y), "top1": (logits.argmax(1) == y).float().mean()}

    train("classifier", net, loss, run, batch=64, lr=1e-3, weight_decay=0.05).save_pretrained(run.out,
                                                                                                dtype=torch.float16)


RECIPES: dict[str, Callable] = {"reader": reader, "counter": counter, "clip": clip, "perceptual": perceptual,
                                "vae": vae, "unet": unet, "pixels": pixels, "pixels-class": pixels_class,
                                "classifier": classifier}
STEPS = {"reader": 4_000, "counter": 2_000, "clip": 900, "perceptual": 1_500, "vae": 5_000, "unet": 9_000,
         "pixels": 3_500, "pixels-class": 3_500, "classifier": 2_500}  # those of the weights that ship
ONE_MODEL = {"clip", "vae", "unet"}  # these write parts of one folder
COUNTED = ("sun", "moon", "object")
OBJECTS = scenes.ATTRIBUTES["object"]
NAMES = [name for key in ("time", "sky", "ground", "object", "color") for name in scenes.ATTRIBUTES[key]]
WAY_DOWN = dict(in_channels=3, block_out_channels=(32, 64, 96), layers_per_block=1, heads=4, cross_attention_dim=None,
                norm_num_groups=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))
PROMPTS = [scenes.caption(scenes.sample(random.Random(f"look {i}"), second=0.0)) for i in range(16)]


def run(name: str, *, out: str | Path | None = None, steps: int | None = None, seconds: float | None = None,
        size: int | None = None, device: str | None = None, threads: int | None = None, data: str | Path | None = None,
        init: str | Path | None = None, resume: bool = False, seed: int = 0) -> Path:
    """Train one recipe. Returns the folder it wrote to.

    Args:
        name: a key of RECIPES.
        out: the model's folder, by default runs/mini-sd for clip, vae and unet, runs/NAME for the others.
        steps: optimizer steps. seconds: stop after so much time; continue with resume=True.
        size: side of the pictures in pixels, by default 64 (perceptual 128, reader 32, those of pixels 16).
        data: a folder with metadata.jsonl instead of scenes.
        init: a folder with weights of the same part to start from.

    Raises:
        ValueError: unknown recipe, options that do not fit it, or a run to resume that was made with others.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    size = inspect.signature(RECIPES[name]).parameters["size"].default if size is None else size
    text = f"size is {size}; it must be a positive multiple of 16 pixels"
    size = whole("size", size, 16, 2**14, text)
    if size % 16:
        raise ValueError(text)
    data, init = (Path(folder) if folder else None for folder in (data, init))
    out = Path(out or f"runs/{'mini-sd' if name in ONE_MODEL else name}")
    settings = Run(out, STEPS[name] if steps is None else steps, seconds, device, threads, resume, seed=seed)
    parts = ("vae", "text_encoder", "tokenizer") if name == "unet" else ()
    eye = {"another perceptual net": digest(weights_dir() / "perceptual")} if name == "vae" and size > 64 else {}
    settings = replace(settings, made=made_of(settings, size, data, init, parts) | eye)
    check(name, settings)
    out.mkdir(parents=True, exist_ok=True)
    RECIPES[name](settings, size=size, data=data, init=init)
    return out


def labelled(run: Run, size: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """Drawings (n,3,size,size) uint8 with one object each, and its index in OBJECTS (n,)."""
    if data:
        raise ValueError("this recipe learns the objects of scenes; it cannot be trained on a folder (--data)")
    pictures, drawn = draw(DRAWINGS, size, seed=run.seed, second=0.0)
    return pictures, torch.tensor([OBJECTS.index(scene.object) for scene in drawn])


def pixel_unet(name: str, run: Run, pictures: Tensor, labels: Tensor | None, init: Path | None) -> None:
    """Train a U-Net of the pixels (n,3,s,s) uint8, with labels (n,) as its `vec`; class len(OBJECTS) means not told."""
    size, nothing = pictures.shape[-1], len(OBJECTS)
    config = UNetConfig(sample_size=size, out_channels=3, num_class_embeds=None if labels is None else nothing + 1,
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **WAY_DOWN)
    net = start(UNet, config, run, init, "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim")

    def loss(net: UNet, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), 64, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        x0 = to_unit(pictures[rows])
        t, eps, cond = torch.randint(SD.T, rows.shape, generator=g), torch.randn(x0.shape, generator=g), {}
        if labels is not None:
            dropped = torch.rand(len(rows), generator=g) < 0.1                      # for guidance
            cond = {"vec": labels[rows].masked_fill(dropped, nothing).to(device)}
        return {"loss": losses.diffusion(net, "eps", SD, x0.to(device), t.to(device), eps.to(device), **cond).mean()}

    @torch.inference_mode()
    def sample(net: UNet):
        device = next(net.parameters()).device
        z = torch.randn(32, 3, size, size, generator=generator(run.seed)).to(device)
        cond = {} if labels is None else {"vec": torch.arange(32, device=device) % nothing}
        *_, last = ddim(denoiser(partial(net, **cond), "eps"), z, preset("sd-ddpm", 50))
        return sheet(last.x, 16)

    train(name, net, loss, run, batch=64, lr=1e-3, ema=0.9995, sample=sample).save_pretrained(run.out,
                                                                                             dtype=torch.float16)


def save_pipeline(net: UNet, out: Path) -> None:
    """Write the U-Net and all that makes the folder a model in diffusers' layout, in float16."""
    text, vae = Text.from_pretrained(out), VAE.from_pretrained(out / "vae")
    StableDiffusion(text, net, vae, SCHEDULER).save_pretrained(out, dtype=torch.float16)


def start(net: type, config: Config, run: Run, init: Path | None, *same: str) -> nn.Module:
    """A network with the weights in `init`, which must be as `config` says in the fields `same`, or with random ones.

    Raises:
        ValueError: it is not.
    """
    if not init:
        return seeded(lambda: net.build(config), run.seed)
    found = net.from_pretrained(init)
    for name in same:
        given, needed = (attrgetter(name)(each) for each in (found.config, config))
        if given != needed:
            raise ValueError(f"the weights in {init} are made for {name.split('.')[-1]} {given}, this run needs "
                             f"{needed}: give others, or the options that they were made with")
    return found


def seeded(build: Callable, seed: int):
    """build() with torch's random numbers seeded, the generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def slots(scene: scenes.Scene) -> dict:
    """The truth the reader is trained on: three indices, then for each place what stands there (−1: not asked)."""
    values = scenes.ATTRIBUTES
    nothing = len(values["object"])
    row = {name: values[name].index(getattr(scene, name)) for name in SCENE}
    row |= {"object": [nothing] * 3, "color": [-1] * 3, "size": [-1] * 3}
    things = [(scene.place, scene.object, scene.color, scene.size)]
    if scene.second:
        color, obj, size = scene.second
        things.append(("right", obj, color, size))
    for place, *thing in things:
        for name, value in zip(THING, thing):
            row[name][values["place"].index(place)] = values[name].index(value)
    return row

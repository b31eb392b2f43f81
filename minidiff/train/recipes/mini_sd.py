"""A Stable Diffusion in miniature: clip and vae learn from drawings, unet from cached latents.

Each writes its part of one folder in diffusers' layout; perceptual is a net of its own, which the VAE learns with.
"""
from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data import scenes
from minidiff.device import default_device
from minidiff.io.tokenizer import load_tokenizer, train_tokenizer
from minidiff.io.weights import weights_dir
from minidiff.nets.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig
from minidiff.nets.patches import Patches, PatchesConfig
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.schedule import SD
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import Text, tokenize
from minidiff.train import losses
from minidiff.train.pictures import DRAWINGS, Drawings, crops, dataset, from_bytes, latents, sheet, tokenize_all
from minidiff.train.recipes.begin import fitted, grown, seeded, start
from minidiff.train.trainer import Run, batch_indices, digest, generator, train

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "timestep_spacing": "leading",
             "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}  # as Stable Diffusion 1.x, with DDIM
NAMES = [name for key in ("time", "sky", "ground", "object", "color") for name in scenes.ATTRIBUTES[key]]
PROMPTS = [scenes.caption(scenes.sample(random.Random(f"look {i}"), second=0.0)) for i in range(16)]


def clip(run: Run, *, size: int = 128, data: Path | None = None, init: Path | None = None) -> None:
    """Tokenizer and CLIP: a text and an image encoder trained contrastively on captioned pictures."""
    pictures, captions = dataset(run, size, data)
    files = [run.out / "tokenizer" / name for name in ("vocab.json", "merges.txt")]
    if not (run.resume or init) or not all(map(Path.is_file, files)):       # a kill may have come between the two
        train_tokenizer((caption for row in captions[:20_000] for caption in row), run.out / "tokenizer")
    tokenizer, run = load_tokenizer(run.out / "tokenizer"), fitted(run, len(pictures))
    ids = tokenize_all(tokenizer, captions)
    vocabulary = tokenizer.get_vocab_size()
    shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, projection_dim=128)
    text = CLIPTextConfig(vocab_size=vocabulary, eos_token_id=vocabulary - 1, **shape)
    vision = CLIPVisionConfig(image_size=size, patch_size=size // 4, **shape)
    net = start(CLIP, CLIPConfig(text, vision), run, init, "text_config.vocab_size", "vision_config.image_size")
    run = replace(run, made={**run.made, "another vocabulary": digest(run.out / "tokenizer")})

    def loss(net: CLIP, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), run.batch, step, run.seed)[share]
        wording = torch.randint(ids.shape[1], rows.shape, generator=generator(run.seed, step, share.start))
        chosen = ids[rows, wording]
        longest = int(chosen.argmax(1).max()) + 1  # the mask is causal: what follows the end token changes nothing
        device = next(net.parameters()).device
        caption, image = net(chosen[:, :longest].long().to(device), from_bytes(pictures[rows]).to(device))
        hits = (image @ caption.T).argmax(1) == torch.arange(len(rows), device=device)
        return {"loss": losses.contrastive(image, caption, net.logit_scale), "top1": hits.float().mean(),
                "scale": net.logit_scale.exp()}

    average = train("clip", net, loss, run, batch=run.batch, lr=1e-3, weight_decay=0.1)
    average.save_pretrained(run.out / "train" / "clip" / "model")
    average.text_encoder().save_pretrained(run.out / "text_encoder", dtype=torch.float16)


def perceptual(run: Run, *, size: int = 128, data: Path | None = None, init: Path | None = None) -> None:
    """Net that names what crops of drawings show; the VAE compares its maps of two pictures (perceptual loss).

    Raises:
        ValueError: a folder (data); it learns from scenes alone.
    """
    if data:
        raise ValueError("this recipe learns the attributes of scenes; it cannot be trained on a folder (--data)")
    drawings = Drawings(DRAWINGS, size, seed=run.seed)
    run = fitted(run, len(drawings))
    config = PatchesConfig(block_out_channels=(16, 32, 64, 96), out_channels=len(NAMES))
    net = start(Patches, config, run, init, "out_channels")

    def loss(net: Patches, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(drawings), run.batch, step, run.seed)[share]
        pictures, drawn = drawings.shown(rows)
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = from_bytes(crops(pictures.repeat(4, 1, 1, 1), size // 2, g)).to(device)
        truth = torch.tensor([[name in (*scene, *(scene.second or ())) for name in NAMES] for scene in drawn])
        truth = truth.repeat(4, 1).to(device)
        logits = net(image)[0].float().mean((2, 3))
        return {"loss": F.binary_cross_entropy_with_logits(logits, truth.float()),
                "right": ((logits > 0) == truth).float().mean()}

    train("perceptual", net, loss, run, batch=run.batch, lr=2e-3).save_pretrained(run.out, dtype=torch.float16)


def vae(run: Run, *, size: int = 128, data: Path | None = None, init: Path | None = None) -> None:
    """KL-VAE on crops; f = 4, above 64 pixels f = 8, with a perceptual loss and, towards the end, a discriminator.

    Above 64 pixels, weights to start from that have one level of resolution less are those of half the size: the VAE
    grows from them and keeps their latents, on which a U-Net may have been trained.
    """
    large = size > 64
    pictures, _ = dataset(run, size, data)
    chs = (32, 32, 64, 96) if large else (32, 64, 96)
    config = VAEConfig(sample_size=size, layers_per_block=1, latent_channels=4, block_out_channels=chs,
                       norm_num_groups=16)
    net, small = start(VAE, config, run, init), None
    if large and len(net.config.block_out_channels) < len(chs):
        net, small = grown(net, run.seed), net.requires_grad_(False).to(run.device or default_device())
    factor = None if small is None else small.config.scaling_factor
    run = replace(run, made={**run.made, "another VAE to grow from": digest(init) if small else ""})
    net.config = replace(net.config, sample_size=size, scaling_factor=1.0)
    nets = nn.ModuleDict({"vae": net})
    if large:
        nets["critic"] = seeded(lambda: Patches(PatchesConfig()), run.seed)
        eye = Patches.from_pretrained(weights_dir() / "perceptual").to(run.device or default_device())
    run, side = fitted(run, len(pictures)), 64 if large else 32

    def loss(nets: nn.ModuleDict, step: int, share: slice) -> dict[str, Tensor]:
        net, rows = nets["vae"], batch_indices(len(pictures), run.batch, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = from_bytes(crops(pictures[rows], min(size, side), g)).to(device)
        mean, logvar = (m.float() for m in net.moments(image))
        decoded = net.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g).to(device)).float()
        total = losses.vae(image, decoded, mean, logvar)
        values = {"psnr": 10 * torch.log10(4 / (decoded - image).detach().square().mean())}
        if small:
            with torch.no_grad():
                kept, _ = small.moments(F.avg_pool2d(image, 2))
            values["drift"] = factor ** 2 * F.mse_loss(mean, kept.float())
            total = total + values["drift"]
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
        image = from_bytes(pictures[torch.arange(min(16, len(pictures)))]).to(next(net.parameters()).device)
        with torch.inference_mode():
            return sheet(torch.cat([image, net.decode(net.encode(image))]), 8)

    net = train("vae", nets, loss, run, batch=run.batch, lr=1.5e-4 if small else 2e-3, sample=sample)["vae"]
    if not factor:
        with torch.inference_mode():  # latents that enter the U-Net have unit standard deviation
            parts = torch.arange(min(len(pictures), 1024)).split(64)
            z = torch.cat([net.to("cpu").encode(from_bytes(pictures[rows])) for rows in parts])
        factor = round(1 / z.std().item(), 5)
    net.config = replace(net.config, scaling_factor=factor)
    net.save_pretrained(run.out / "vae", dtype=torch.float16)


def unet(run: Run, *, size: int = 128, data: Path | None = None, init: Path | None = None) -> None:
    """Cross-attention U-Net of 7 M parameters on cached latents, with the clip and vae found in --out.

    A net that is given goes on, at a fifth of the rate and with the weights of v's loss: an error amid much noise,
    where the places of things are decided, counts far more in it than in that of eps. The text encoder then learns too.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    for part, recipe in (("text_encoder", "clip"), ("vae", "vae")):
        if not (run.out / part / "config.json").is_file():
            raise FileNotFoundError(f"{run.out} has no {part}; train it first: python -m minidiff train {recipe} "
                                    f"--out {run.out}")
    means, stds, ids = latents(run, size, data)
    run = fitted(run, len(means))
    text = CLIPText.from_pretrained(run.out / "text_encoder").eval().requires_grad_(bool(init))
    empty = tokenize(load_tokenizer(run.out / "tokenizer"), [""])[0]
    config = UNetConfig(sample_size=means.shape[-1], in_channels=means.shape[1], out_channels=means.shape[1],
                        block_out_channels=(64, 128, 160), layers_per_block=1, heads=4,
                        cross_attention_dim=text.config.hidden_size,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    net = start(UNet, config, run, init, "in_channels", "out_channels", "cross_attention_dim")
    nets = nn.ModuleDict({"unet": net, "text": text})
    run = replace(run, made={**run.made, "another U-Net to go on from": digest(init) if init else ""})

    def loss(nets: nn.ModuleDict, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), run.batch, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(nets.parameters()).device
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        chosen[torch.rand(len(rows), generator=g) < 0.1] = empty.to(chosen)  # caption dropout, for guidance
        t, eps = torch.randint(SD.T, rows.shape, generator=g), torch.randn(z0.shape, generator=g)
        context, _ = nets["text"](chosen.long().to(device))
        each = losses.diffusion(nets["unet"], "eps", SD, z0.to(device), t.to(device), eps.to(device), context=context)
        weight = losses.implied_weight("v", *SD(t)).to(each) if init else 1.0
        return {"loss": (weight * each).mean(), "simple": each.mean()}

    def sample(nets: nn.ModuleDict):
        save_pipeline(nets, run.out)
        drawn = StableDiffusion.from_pretrained(run.out, device=str(next(nets.parameters()).device))
        return sheet(drawn(PROMPTS, output="tensor") * 2 - 1, 8)

    rate = 2e-4 if init else 1e-3
    save_pipeline(train("unet", nets, loss, run, batch=run.batch, lr=rate, ema=0.9995, sample=sample), run.out)


def save_pipeline(nets: nn.ModuleDict, out: Path) -> None:
    """Write the nets "unet" and "text" and all that makes the folder a model in diffusers' layout, in float16."""
    text, vae = Text([load_tokenizer(out / "tokenizer")], [nets["text"]]), VAE.from_pretrained(out / "vae")
    StableDiffusion(text, nets["unet"], vae, SCHEDULER).save_pretrained(out, dtype=torch.float16)

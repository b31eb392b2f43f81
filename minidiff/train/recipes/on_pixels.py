"""The nets of the notebooks on the process: on pixels of 16×16 pictures, without prompt or VAE."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import files, scenes
from minidiff.nets.classifier import Classifier, ClassifierConfig
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.prediction import denoiser
from minidiff.samplers import ddim
from minidiff.schedule import SD
from minidiff.sd.scheduler import preset
from minidiff.train import losses
from minidiff.train.pictures import Pictures, draw, drawings, from_bytes, sheet
from minidiff.train.recipes.begin import fitted, start
from minidiff.train.trainer import Run, batch_indices, generator, train

OBJECTS = scenes.ATTRIBUTES["object"]
WAY_DOWN = dict(in_channels=3, block_out_channels=(32, 64, 96), layers_per_block=1, heads=4, cross_attention_dim=None,
                norm_num_groups=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"))


def pixels(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """U-Net of 2 M parameters on the pixels of small pictures, without prompt or VAE."""
    pictures = Pictures.of(picture for picture, _ in files.stream_folder(data, size)) if data else \
        draw(drawings(run), size, seed=run.seed, second=0.0)[0]
    pixel_unet("pixels", run, size, pictures, None, init)


def pixels_class(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """The pixel model's sibling that is told the object's class, or (in a tenth of the pictures) nothing."""
    pixel_unet("pixels-class", run, size, *labelled(run, size, data), init)


def classifier(run: Run, *, size: int = 16, data: Path | None = None, init: Path | None = None) -> None:
    """Classifier of the object in a noisy picture, for classifier guidance of the pixel model."""
    pictures, labels = labelled(run, size, data)
    config = ClassifierConfig(num_classes=len(OBJECTS), mid_block_type="UNetMidBlock2DCrossAttn", **WAY_DOWN)
    run = fitted(run, len(pictures))
    net = start(Classifier, config, run, init, "num_classes", "in_channels")

    def loss(net: Classifier, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), run.batch, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        x0 = from_bytes(pictures[rows])
        t = torch.randint(SD.T, rows.shape, generator=g)
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in SD(t))
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=g)
        logits, y = net(x.to(device), t.to(device)).float(), labels[rows].to(device)
        return {"loss": F.cross_entropy(logits, y), "top1": (logits.argmax(1) == y).float().mean()}

    train("classifier", net, loss, run, batch=run.batch, lr=1e-3, weight_decay=0.05).save_pretrained(run.out,
                                                                                                dtype=torch.float16)


def labelled(run: Run, size: int, data: Path | None) -> tuple[Pictures, Tensor]:
    """Drawings with one object each, and its index in OBJECTS (n,).

    Raises:
        ValueError: a folder (data); these recipes learn from scenes alone.
    """
    if data:
        raise ValueError("this recipe learns the objects of scenes; it cannot be trained on a folder (--data)")
    pictures, drawn = draw(drawings(run), size, seed=run.seed, second=0.0)
    return pictures, torch.tensor([OBJECTS.index(scene.object) for scene in drawn])


def pixel_unet(name: str, run: Run, size: int, pictures: Pictures, labels: Tensor | None, init: Path | None) -> None:
    """Train a U-Net of the pixels, with labels (n,) as its `vec`; class len(OBJECTS) means not told."""
    nothing = len(OBJECTS)
    config = UNetConfig(sample_size=size, out_channels=3, num_class_embeds=None if labels is None else nothing + 1,
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **WAY_DOWN)
    run = fitted(run, len(pictures))
    net = start(UNet, config, run, init, "in_channels", "out_channels", "num_class_embeds", "cross_attention_dim")

    def loss(net: UNet, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(pictures), run.batch, step, run.seed)[share]
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        x0 = from_bytes(pictures[rows])
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

    train(name, net, loss, run, batch=run.batch, lr=1e-3, ema=0.9995, sample=sample).save_pretrained(run.out,
                                                                                             dtype=torch.float16)

"""ControlNets in a run of the pipeline: their pictures, their scales, and the calls during which they count."""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.grid import Grid
from minidiff.io.images import to_tensor, to_unit
from minidiff.nets.controlnet import ControlNet
from minidiff.prediction import Pred
from minidiff.schedule import Level
from minidiff.sd.models import Model
from minidiff.sd.settings import Settings


def prepare(model: Model, s: Settings, shape: tuple[int, ...], calls: Callable[[], int]) -> list[tuple]:
    """What `guidance.controlled` needs, for each ControlNet; it is moved to the U-Net's device and dtype.

    Args:
        shape: of the latents (B,C,h,w), a part of B for each of the prompts.
        calls: how many network calls there will be; call i of n counts from i/n to (i + 1)/n.

    Returns:
        For each: net, hint (B,C,h,w), one scale or one for each call, whether in guess mode.

    Raises:
        ValueError: a ControlNet of another family, or pictures that do not fit the prompts.
    """
    rows, unet, factor, prompts = [], model.unet, model.vae.factor, shape[0] // s.num_images
    for net, picture, scale, start, end, guess in s.controls:
        if not isinstance(net, ControlNet):
            raise ValueError(f"controlnet is a {type(net).__name__}; it must be a ControlNet, such as "
                             "ControlNet.from_pretrained gives")
        for what, its, own in (("width of prompts", net.config.cross_attention_dim, unet.config.cross_attention_dim),
                               ("channels", net.config.block_out_channels, unet.config.block_out_channels),
                               ("pixels per latent", net.config.factor, factor)):
            if its != own:
                raise ValueError(f"the ControlNet is of another family than the model: its {what}: {its}, the model's: "
                                 f"{own}")
        image = to_unit(to_tensor(picture, *(side * factor for side in shape[-2:])))
        if len(image) not in (1, prompts):
            raise ValueError(f"there are {len(image)} control images for {shape[0]} pictures; give one, or as many as "
                             f"prompts: {prompts}")
        image = image.repeat_interleave(shape[0] // len(image), 0).to(unet.conv_in.weight)
        if (start, end) != (0, 1):
            n = calls()
            scale = [scale * (i / n >= start and (i + 1) / n <= end) for i in range(n)]
        rows.append((net, net.to(unet.conv_in.weight).look(image), scale, guess or net.config.global_pool_conditions))
    return rows


def calls(sampler: Callable, levels: Grid, options: dict) -> int:
    """How often a sampler calls the network: seen in a dry run on a single number.

    >>> from minidiff import samplers; from minidiff.sd import scheduler
    >>> [calls(samplers.SAMPLERS[name], scheduler.preset(f"sd-{name}", 5), {}) for name in ("ddim", "heun")]
    [5, 9]
    """
    seen = []

    def denoise(x: Tensor, level: Level) -> Pred:
        seen.append(level)
        return Pred(x, x)

    noise = {"noise": torch.zeros_like} if "noise" in inspect.signature(sampler).parameters else {}
    for _ in sampler(denoise, torch.zeros(1), levels, **options, **noise):
        pass
    return len(seen)

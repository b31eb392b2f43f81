"""A run of Stable Diffusion: everything checked and encoded, then the sampler, step by step."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minidiff import guidance
from minidiff.grid import Step
from minidiff.io.images import check_sides, to_mask, to_tensor
from minidiff.io.weights import nonfinite
from minidiff.nets.attention import Kept
from minidiff.nets.packed import packed
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.prediction import denoiser
from minidiff.schedule import Discrete
from minidiff.sd import control, memory
from minidiff.sd.conditions import draw, encode, paste, plan, posterior, rows
from minidiff.sd.settings import Settings, check_seeds
from minidiff.text import Text


class Model(Protocol):
    """What a run needs: `minidiff.sd.pipeline.StableDiffusion` has it.

    Attributes:
        scheduler, schedule, kind: its `scheduler_config.json`, the noise levels, and what the U-Net predicts.
        zeros: whether no negative prompt means zeros, not "". compiled: whether the networks are.
        worker: where the networks are moved to work; None: they stay where they are, on `device`.
        sides: of the pictures that it was trained on. spreads: see `minidiff.sd.conditions.plan`.
    """

    text: Text
    unet: UNet
    vae: VAE
    scheduler: dict[str, Any]
    schedule: Discrete
    kind: str
    zeros: bool
    compiled: bool
    worker: torch.device | None
    device: torch.device
    sides: tuple[int, int]
    spreads: bool


@contextmanager
def at_work(model: Model, net: nn.Module) -> Iterator[nn.Module]:
    """A network where it works; where networks are offloaded, it is brought there, and back to the CPU at the end."""
    if model.worker is not None:
        net.to(model.worker)
    try:
        yield net
    finally:
        if model.worker is not None:
            net.to("cpu")


def run(model: Model, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
    """The steps of a run, the first still to be taken: whatever is wrong is said at once.

    Raises:
        ValueError: a setting that does not fit the model or the others, or too little memory.
    """
    return _steps(model, _prepare(model, prompt, s), s)


@torch.inference_mode()
def _steps(model: Model, steps: Iterator[Step], s: Settings) -> Iterator[Step]:
    nets = nn.ModuleList([model.unet, *(controlnet for controlnet, *_ in s.controls)])
    with at_work(model, nets), nullcontext() if model.compiled else packed(nets):
        for number, step in enumerate(steps):
            if number == 1:
                check_finite(model, step.x)
            yield step


def check_finite(model: Model, x: Tensor) -> None:
    """ValueError if a state or picture holds NaN or infinite numbers: large files are not looked through when loaded.

    Raises:
        ValueError: it names the weights that hold some too.
    """
    if x.isfinite().all():
        return
    for name, net in (("U-Net", model.unet), ("text encoder", model.text), ("VAE", model.vae)):
        if broken := nonfinite(net.state_dict()):
            raise ValueError(f"the weights of the {name} hold NaN or infinite numbers in {broken}: the file is damaged")
    raise ValueError("the picture holds NaN or infinite numbers; try a lower guidance scale, or dtype float32")


@torch.inference_mode()
def _prepare(model: Model, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
    """Check everything, encode prompts and pictures, draw the first noise; return the sampler, not yet begun."""
    unet, factor, channels = model.unet, model.vae.factor, model.vae.config.latent_channels
    repaints = _repaints(unet.config.in_channels, channels, s)
    sampler, levels, options, clipped = plan(model.scheduler, model.schedule, s, model.spreads)
    image = None if s.image is None else to_tensor(s.image, s.height, s.width, factor)
    sides = _sides(model, s) if image is None else tuple(image.shape[-2:])
    check_sides(sides, factor)
    guided = s.guidance_scale > 1 and not unet.config.time_cond_proj_dim
    with at_work(model, model.text) as text:
        given, other = encode(text, prompt, s, guided=guided, zeros=model.zeros)
    cond, uncond = ({name: part.to(model.device, unet.conv_in.weight.dtype)
                     for name, part in rows(pair, unet.config, s, sides).items()} if pair else None
                    for pair in (given, other))
    pictures = len(given[0]) * s.num_images
    check_seeds(s.seed, pictures)
    generators = [torch.Generator().manual_seed(s.seed + i) for i in range(pictures)]
    shape = (pictures, channels, *(side // factor for side in sides))
    if s.latents is not None and s.latents.shape != shape:
        raise ValueError(f"latents have the shape {tuple(s.latents.shape)}; it should be {shape}")
    memory.check(unet, model.vae, model.device, rows=pictures * (1 + guided), pictures=pictures, sides=sides,
                 tile=s.tile, offloaded=model.worker is not None)

    pure = image is None or (s.mask is not None and s.taken == 1)        # whether to start from noise alone
    z0 = None if image is None or (pure and repaints) else _latents(model, image, generators, s)
    z = (draw(generators, shape) if s.latents is None else s.latents.float()).to(model.device)
    x = levels.start(z) if pure else levels[0].alpha * z0 + levels[0].sigma * z
    more = None
    if s.mask is not None:
        mask = to_mask(s.mask, *sides)
        hole = nn.functional.interpolate(_each(mask, pictures, s, "masks"), size=shape[2:]).to(z)
        # a U-Net that does not repaint has no use for the rest, but as in the reference it is drawn, before other noise
        rest = _latents(model, image * (1 - mask), generators, s)
        more = torch.cat([hole, rest], 1) if repaints else None
    calls = functools.partial(control.calls, sampler, levels, options)
    net = _net(model, control.prepare(s.controls, unet, factor, shape, len(given[0]), calls), more,
               1 if uncond is None else 2)
    if uncond is None:
        net = functools.partial(net, **cond)
    else:
        net = guidance.cfg(net, cond, uncond, s.guidance_scale, s.guidance_rescale)
    denoise = denoiser(net, model.kind)
    if clipped is not None:
        denoise = guidance.clip(denoise, -clipped, clipped)
    if "noise" in inspect.signature(sampler).parameters:
        options["noise"] = lambda like: draw(generators, like.shape).to(like)
    if s.mask is None or repaints:
        return sampler(denoise, x, levels, **options)
    return paste(sampler(guidance.inpaint(denoise, z0, hole, z), x, levels, **options), levels[-1], z0, hole)


def _repaints(inputs: int, channels: int, s: Settings) -> bool:
    """Whether the U-Net is told the mask and the rest of the picture, beside the state."""
    if inputs not in (channels, 2 * channels + 1):
        raise ValueError(f"this U-Net has {inputs} input channels; supported are {channels} and, for inpainting, "
                         f"{2 * channels + 1}")
    if inputs != channels and s.mask is None:
        raise ValueError("this is an inpainting model: give an image and a mask, as with pipe.inpaint")
    return inputs != channels


def _net(model: Model, controls: list[tuple], more: Tensor | None, copies: int) -> Callable:
    """The U-Net in its own dtype on a float32 state; a prompt's keys and values are computed only once.

    Args:
        controls: see `control.prepare`. more: further channels of the state, for an inpainting U-Net.
        copies: how often the same states will stand in a batch, each time with other prompts.
    """
    kept, dtype = functools.cache(Kept), model.unet.conv_in.weight.dtype

    def told(part: Callable, copies: int = 1) -> Callable:
        if model.compiled:
            return part
        return lambda x, t, context, **cond: part(x[:len(x) // copies], t, kept(context), **cond)

    net = told(model.unet, copies) if more is None else guidance.extended(told(model.unet, copies), more.to(dtype))
    for controlnet, hint, scales, guess in controls:
        net = guidance.controlled(net, told(controlnet), hint.to(model.device), scales, guess=guess)
    # t as a tensor: a net would be compiled anew for each number
    return lambda x, t, **cond: net(x.to(dtype), torch.tensor(t, device=x.device), **cond).float()


def _sides(model: Model, s: Settings) -> tuple[int, int]:
    """Height and width of what is drawn from noise: as given, or the control image's, or the model's own."""
    if s.height and s.width:
        return s.height, s.width
    if s.controls:
        _, picture, *_ = s.controls[0]
        own = to_tensor(picture, s.height, s.width, model.vae.factor).shape[-2:]
    else:
        own = model.sides
    return s.height or own[0], s.width or own[1]


def _latents(model: Model, image: Tensor, generators: list[torch.Generator], s: Settings) -> Tensor:
    """A sample of the picture's latents for each of those to draw, (B,C,h,w) float32."""
    prompts = len(generators) // s.num_images
    if len(image) not in (1, prompts):
        raise ValueError(f"there are {prompts} prompts, but {len(image)} images")
    with at_work(model, model.vae) as vae:
        return posterior(vae, image, generators, s.tile).to(model.device)


def _each(parts: Tensor, pictures: int, s: Settings, what: str) -> Tensor:
    """One, or one per prompt, as one for each picture to draw."""
    if len(parts) not in (1, pictures // s.num_images):
        raise ValueError(f"there are {pictures // s.num_images} prompts, but {len(parts)} {what}")
    return parts.repeat_interleave(pictures // len(parts), 0)

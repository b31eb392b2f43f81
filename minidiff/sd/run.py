"""A run of Stable Diffusion, from top to bottom: everything checked and encoded, then the sampler, step by step."""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from minidiff import guidance
from minidiff.grid import Grid, Step
from minidiff.io.images import check_sides, to_mask, to_tensor
from minidiff.io.weights import nonfinite
from minidiff.nets.attention import kept
from minidiff.nets.packed import packed
from minidiff.prediction import denoiser
from minidiff.sd import control, memory
from minidiff.sd.conditions import draw, encode, plan, rows
from minidiff.sd.models import Model
from minidiff.sd.settings import Settings, check_seeds

Told = dict[str, Tensor]  # what a net is told beside the state and the time, by name


def run(model: Model, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
    """The steps of a run, the first still to be taken: whatever is wrong is said at once.

    Raises:
        ValueError: a setting that does not fit the model or the others, or too little memory.
    """
    s = model.settled(s)
    return _steps(model, _begin(model, prompt, s), s)                   # a generator alone would check when first asked


@torch.inference_mode()
def _steps(model: Model, steps: Iterator[Step], s: Settings) -> Iterator[Step]:
    """The sampler's steps, taken with networks that are where they work, and as fast as they can be."""
    nets = nn.ModuleList([model.unet, *(net for net, *_ in s.controls)])
    with model.at_work(nets), ExitStack() as stack:
        for faster in () if model.compiled else (packed, kept):         # they would have a compiled net traced anew
            stack.enter_context(faster(nets))
        for number, step in enumerate(steps):
            if number == 1:                                             # broken weights show in the first call
                check_finite(model, step.x)
            yield step


def check_finite(model: Model, x: Tensor) -> None:
    """ValueError if a state or picture holds NaN or infinite numbers, naming the weights that hold some too."""
    if x.isfinite().all():
        return
    for name, net in (("U-Net", model.unet), ("text encoder", model.text), ("VAE", model.vae)):
        if broken := nonfinite(net.state_dict()):                       # large files are not looked through before
            raise ValueError(f"the weights of the {name} hold NaN or infinite numbers in {broken}: the file is damaged")
    raise ValueError("the picture holds NaN or infinite numbers; try a lower guidance scale, or dtype float32")


@torch.inference_mode()
def _begin(model: Model, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
    """The sampler, not yet begun: settings checked, prompts and pictures encoded, the first noise drawn."""
    repaints = _repaints(model, s)
    sampler, levels, options, clipped = plan(model.scheduler, model.schedule, s, model.spreads)
    image, mask, sides = _canvas(model, s)
    cond, uncond = _prompts(model, prompt, s, sides)
    shape = (len(cond["context"]), model.vae.config.latent_channels, *(side // model.vae.factor for side in sides))
    _check(model, s, shape, guided=uncond is not None, images=image, masks=mask)

    # One generator for each picture drawn, so that it does not depend on its batch. The draws come in the reference's
    # order, else its seeds gave other pictures: latent of the given picture, first noise, latent of what is outside the
    # mask, the sampler's noise
    generators = [torch.Generator().manual_seed(s.seed + i) for i in range(shape[0])]
    x, z0, z = _start(model, s, levels, image, generators, shape, repaints)
    hole, rest = (None, None) if mask is None else _outside(model, s, image, mask, generators)

    controls = control.prepare(model, s, shape, lambda: control.calls(sampler, levels, options))
    net = _net(model, s, cond, uncond, torch.cat([hole, rest], 1) if repaints else None, controls)
    denoise = denoiser(net, model.kind)
    if clipped is not None:
        denoise = guidance.clip(denoise, -clipped, clipped)
    if "noise" in inspect.signature(sampler).parameters:                # not torch's global generator
        options["noise"] = lambda like: draw(generators, like.shape).to(like)
    if mask is None or repaints:
        return sampler(denoise, x, levels, **options)
    return guidance.paste(sampler(guidance.inpaint(denoise, z0, hole, z), x, levels, **options), z0, hole)


def _repaints(model: Model, s: Settings) -> bool:
    """Whether the U-Net is told the mask and the rest of the picture, beside the state."""
    inputs, channels = model.unet.config.in_channels, model.vae.config.latent_channels
    if inputs not in (channels, 2 * channels + 1):
        raise ValueError(f"this U-Net has {inputs} input channels; supported are {channels} and, for inpainting, "
                         f"{2 * channels + 1}")
    if inputs != channels and s.mask is None:
        raise ValueError("this is an inpainting model: give an image and a mask, as with pipe.inpaint")
    return inputs != channels


def _canvas(model: Model, s: Settings) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    """The picture to start from and its mask, if any, and the height and width of what is drawn."""
    factor = model.vae.factor
    if s.image is not None:
        image = to_tensor(s.image, s.height, s.width, factor)
        sides = tuple(image.shape[-2:])
        return image, None if s.mask is None else to_mask(s.mask, *sides), sides
    sides = s.height, s.width
    if None in sides:                                                   # the control image's, or the model's own
        default = to_tensor(s.controls[0][1], *sides, factor).shape[-2:] if s.controls else model.sides
        sides = s.height or default[0], s.width or default[1]
    check_sides(sides, factor)
    return None, None, sides


def _prompts(model: Model, prompt: str | list[str] | None, s: Settings,
             sides: tuple[int, int]) -> tuple[Told, Told | None]:
    """What the U-Net is told with the prompt and, if guided, without it: a row for each picture."""
    unet = model.unet
    # a consistency model has learned guidance: it is told the scale, and called once
    guided = s.guidance_scale > 1 and not unet.config.time_cond_proj_dim
    with model.at_work(model.text) as text:
        pairs = encode(text, prompt, s, guided=guided, zeros=model.zeros)
    cond, uncond = ({name: part.to(model.device, unet.conv_in.weight.dtype)
                     for name, part in rows(pair, unet.config, s, sides).items()} if pair else None for pair in pairs)
    return cond, uncond


def _check(model: Model, s: Settings, shape: tuple[int, ...], guided: bool, **pictures: Tensor | None) -> None:
    """ValueError unless there are pictures for all prompts, and seeds, noise and memory for all pictures to draw."""
    n, _, h, w = shape
    prompts = n // s.num_images
    for what, given in pictures.items():
        if given is not None and len(given) not in (1, prompts):
            raise ValueError(f"there are {prompts} prompts, but {len(given)} {what}")
    check_seeds(s.seed, n)
    model.vae.check_tile(s.tile)                                        # before the steps, not after them
    if s.latents is not None and s.latents.shape != shape:
        raise ValueError(f"latents have the shape {tuple(s.latents.shape)}; it should be {shape}")
    memory.check(model.unet, model.vae, model.device, rows=n * (1 + guided), pictures=n,
                 sides=(h * model.vae.factor, w * model.vae.factor), tile=s.tile, offloaded=model.worker is not None)


def _start(model: Model, s: Settings, levels: Grid, image: Tensor | None, generators: list[torch.Generator],
           shape: tuple[int, ...], repaints: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The first state x, the latent z0 of the picture that it is made from, if any, and its noise z."""
    # Like the reference: with a mask and strength 1, noise alone, since what is outside the mask is put back anyway
    pure = image is None or (s.mask is not None and s.taken == 1)
    z0 = None if image is None or (pure and repaints) else _latents(model, s, image, generators)
    z = draw(generators, shape)                                         # also if not used: never again by the sampler
    z = (z if s.latents is None else s.latents.float()).to(model.device)
    return levels.start(z) if pure else levels[0].alpha * z0 + levels[0].sigma * z, z0, z


def _outside(model: Model, s: Settings, image: Tensor, mask: Tensor, generators: list) -> tuple[Tensor, Tensor]:
    """The mask for each latent (B,1,h,w), and the latents (B,C,h,w) of the picture made grey inside it.

    A U-Net that does not repaint has no use for the latents, but the sampler's noise is what comes after theirs.
    """
    rest = _latents(model, s, image * (1 - mask), generators)
    mask = mask.repeat_interleave(len(rest) // len(mask), 0).to(rest)
    return nn.functional.interpolate(mask, size=rest.shape[2:]), rest   # nearest, as in the reference


def _latents(model: Model, s: Settings, image: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Samples (B,C,h,w) float32 of the latents of P given pictures, B/P of each, one for each picture to draw.

    NOTE: image p belongs to prompt p; diffusers deals images out in turn: test_images_follow_their_prompts.
    """
    config, factor = model.vae.config, model.vae.factor
    noise = draw(generators, (len(generators), config.latent_channels, *(side // factor for side in image.shape[-2:])))
    with model.at_work(model.vae) as vae:
        weight, parts = next(vae.parameters()), zip(image.split(1), noise.chunk(len(image)))
        z = [vae.encode(part.to(weight), each.to(weight), tile=s.tile).float() for part, each in parts]
        return torch.cat(z).to(model.device)


def _net(model: Model, s: Settings, cond: Told, uncond: Told | None, more: Tensor | None,
         controls: list[tuple]) -> Callable[[Tensor, float], Tensor]:
    """The U-Net, with all that it is told besides, such as `more` channels: in its own dtype, on a float32 state."""
    unet, dtype = model.unet, model.unet.conv_in.weight.dtype

    def once(x: Tensor, t: Tensor, **told: Tensor) -> Tensor:
        # guidance asks for the same states with two prompts: until these enter, the U-Net computes them once
        return unet(x[:len(x) // 2], t, **told)

    net = unet if uncond is None or model.compiled else once
    if more is not None:
        net = guidance.extended(net, more.to(dtype))
    for controlnet, hint, scales, guess in controls:
        net = guidance.controlled(net, controlnet, hint.to(model.device), scales, guess=guess)

    def typed(x: Tensor, t: float, **told: Tensor) -> Tensor:
        # t as a tensor: a net would be compiled anew for each number. The state stays float32, as what the steps add to
        # it may be less than half precision can tell
        return net(x.to(dtype), torch.tensor(t, device=x.device), **told).float()

    if uncond is None:
        return functools.partial(typed, **cond)
    return guidance.cfg(typed, cond, uncond, s.guidance_scale, s.guidance_rescale)

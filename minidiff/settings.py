"""The settings of a call of the pipeline: the one place where its keyword arguments are collected."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.grid import Grid

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.nets.controlnet import ControlNet

    Picture = Image.Image | Tensor | list[Image.Image]

OUTPUTS = ("pil", "tensor", "latent")
CONTROLS = ("controlnet", "control_image", "control_scale", "control_start", "control_end", "guess_mode")


@dataclass(frozen=True)
class Settings:
    """What one call draws; the keyword arguments of `pipe(…)`, `pipe.img2img`, `pipe.inpaint`, `pipe.stream`.

    Args:
        negative_prompt: what to steer away from, one text or one per prompt; None is "".
        steps: network calls (Heun: two per step), 1 … 1000.
        guidance_scale: e = e_uncond + scale·(e_cond − e_uncond); ≤ 1 is off: one conditional call per step.
        guidance_rescale: share φ in [0, 1] of e that is scaled to the standard deviation of e_cond (2305.08891 eq. 16).
        sampler: None follows the checkpoint's scheduler; a name, what diffusers' class of that name makes of the same
            config; or a pair (function, Grid): then the grid counts the steps.
        seed: image i draws all its noise from one CPU generator seeded with seed + i.
        height, width: in pixels; None: the size the model was trained at (img2img: the image's).
        num_images: per prompt.
        eta: fresh noise of ddim, in [0, 1]; None is 0.
        clip_skip: leave out so many of the text encoder's last layers (for the prompt, not for the negative prompt).
        latents: unit noise (B,C,h,w) to start from instead of the seed's.
        prompt_embeds, negative_prompt_embeds: pairs (context (P,77,D), vec) as `pipe.text` gives, instead of texts.
        prompt_2: SDXL: what the second text encoder reads, one text or one per prompt; None: the prompt.
        original_size, target_size, crops_coords_top_left: SDXL: (height, width) of the picture before it was cropped
            and after, and (top, left) of the crop, as if it were a training picture; None: that of the result.
        long: read prompts beyond 77 tokens, in chunks of 75, instead of cutting them off.
        image: start from this: PIL image(s), on white where they are transparent, or a tensor (3,H,W) or (B,3,H,W) in
            [0, 1]; one, or one per prompt. PIL images of several sizes take that of the first.
        mask: with `image`, what to repaint: white (1) where it is at least ½; PIL, on black where it is transparent, or
            a tensor (H,W) … (B,1,H,W); resized to the image; one, or one per prompt.
        strength: with `image`, the share of the steps that are taken, in (0, 1]: 1 keeps almost nothing of it. None:
            0.6, with a mask 1.
        tile: let the VAE see pictures in overlapping tiles of so many pixels: less memory, not quite the same colours.
        controlnet: adds to the U-Net what a picture tells it; or a list of several.
        control_image: the picture for it, in the form of `image`; resized to the size drawn, which without height and
            width is its own. For several ControlNets a list of one each, as may be all that follows.
        control_scale: how strongly it counts.
        control_start, control_end: the shares of the network calls between which it counts.
        guess_mode: let the picture lead even without a prompt: the uncontrolled half of the guidance is left alone, and
            fine residuals count less; guidance scales of 3 to 5 suit it.
        output: "pil" (a list), "tensor" ((B,3,H,W) in [0, 1]) or "latent" ((B,C,h,w), scaled).

    Raises:
        ValueError: a value outside its range.

    >>> Settings(steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; it must be a whole number from 1 to 1000
    """

    negative_prompt: str | list[str] | None = None
    steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sampler: str | tuple[Callable, Grid] | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    eta: float | None = None
    clip_skip: int = 0
    latents: Tensor | None = None
    prompt_embeds: tuple[Tensor, Tensor | None] | None = None
    negative_prompt_embeds: tuple[Tensor, Tensor | None] | None = None
    prompt_2: str | list[str] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    long: bool = False
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = None
    tile: int | None = None
    controlnet: ControlNet | list[ControlNet] | None = None
    control_image: Picture | list[Picture] | None = None
    control_scale: float | list[float] = 1.0
    control_start: float | list[float] = 0.0
    control_end: float | list[float] = 1.0
    guess_mode: bool | list[bool] = False
    output: str = "pil"

    def __post_init__(self):
        spans = {"steps": (1, 1000), "seed": (0, 2**63), "num_images": (1, 10**6), "clip_skip": (0, 100),
                 "height": (1, 2**20), "width": (1, 2**20)}
        for name, (low, high) in spans.items():
            value = getattr(self, name)
            if value is None and name in ("height", "width"):
                continue
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be a whole number from {low} to {high}")
        for name in ("guidance_rescale", "eta", "strength"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")
        if not (isinstance(self.guidance_scale, Real) and math.isfinite(self.guidance_scale)):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        if not (self.sampler is None or isinstance(self.sampler, str) or _is_pair(self.sampler)):
            raise ValueError(f"sampler is {self.sampler!r}; it must be a name or a pair (function, Grid)")
        if self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}; it must be one of {', '.join(OUTPUTS)}")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs an image, of which it says what to repaint")
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            value = getattr(self, name)
            if value is not None and not (_is_two(value) and all(isinstance(side, int) for side in value)):
                raise ValueError(f"{name} is {value!r}; it must be two whole numbers")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(self, name)
            if value is not None and not (_is_two(value) and isinstance(value[0], Tensor)):
                raise ValueError(f"{name} is a {type(value).__name__}; it must be a pair (context, vec), as "
                                 "pipe.text gives")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("give either a negative_prompt or negative_prompt_embeds")
        if (self.controlnet is None) != (self.control_image is None):
            raise ValueError("controlnet and control_image go together: one of them is missing")
        for _, _, scale, start, end, _ in self.controls:
            if not (math.isfinite(scale) and 0 <= start < end <= 1):
                raise ValueError(f"control_scale, control_start and control_end are {scale}, {start} and {end}; they "
                                 "must be a finite number and two shares 0 ≤ start < end ≤ 1")

    @property
    def taken(self) -> float:
        """The share of the steps that are taken with `image`.

        >>> Settings(strength=0.3).taken, Settings().taken
        (0.3, 0.6)
        """
        return self.strength if self.strength is not None else 0.6 if self.mask is None else 1.0

    @property
    def controls(self) -> list[tuple]:
        """For each ControlNet: net, picture, scale, start, end, guess mode."""
        if self.controlnet is None:
            return []
        values = [getattr(self, name) for name in CONTROLS]
        if not isinstance(self.controlnet, (list, tuple)):
            return [tuple(values)]
        n = len(self.controlnet)
        columns = {name: list(value) if isinstance(value, (list, tuple)) else [value] * n
                   for name, value in zip(CONTROLS, values)}
        if bad := [f"{len(column)} {name}s" for name, column in columns.items() if len(column) != n]:
            raise ValueError(f"there are {n} controlnets, but {', '.join(bad)}")
        return list(zip(*columns.values()))


def _is_two(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _is_pair(sampler: object) -> bool:
    return isinstance(sampler, tuple) and len(sampler) == 2 and callable(sampler[0]) and isinstance(sampler[1], Grid)

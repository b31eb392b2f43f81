"""The settings of a call of the pipeline: the one place where its keyword arguments are collected."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.grid import Grid

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | Tensor | list[Image.Image]

OUTPUTS = ("pil", "tensor", "latent")


@dataclass(frozen=True)
class Settings:
    """What one call draws; the keyword arguments of `pipe(…)`, `pipe.img2img(…)` and `pipe.stream(…)`.

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
        image: start from this: PIL image(s), or a tensor (3,H,W) or (B,3,H,W) in [0, 1]; one, or one per prompt.
        strength: with `image`, the share of the steps that are taken, in (0, 1]: 1 keeps almost nothing of it.
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
    image: Picture | None = None
    strength: float = 0.6
    output: str = "pil"

    def __post_init__(self):
        spans = {"steps": (1, 1000), "seed": (0, 2**63), "num_images": (1, 10**6), "clip_skip": (0, 100)}
        for name, (low, high) in spans.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be a whole number from {low} to {high}")
        for name in ("guidance_rescale", "eta", "strength"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be between 0 and 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        if not (self.sampler is None or isinstance(self.sampler, str) or _is_pair(self.sampler)):
            raise ValueError(f"sampler is {self.sampler!r}; it must be a name or a pair (function, Grid)")
        if self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}; it must be one of {', '.join(OUTPUTS)}")


def _is_pair(sampler: object) -> bool:
    return isinstance(sampler, tuple) and len(sampler) == 2 and callable(sampler[0]) and isinstance(sampler[1], Grid)

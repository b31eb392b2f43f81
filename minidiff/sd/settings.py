"""The settings of a call of the pipeline: the one place where its keyword arguments are collected."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from torch import Tensor

from minidiff.grid import Grid
from minidiff.values import number, truth, whole

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.nets.controlnet import ControlNet

    Picture = Image.Image | Tensor | list[Image.Image]

SEEDS = 2**32  # torch's CPU generator looks at no more than 32 bits of its seed
OUTPUTS = ("pil", "tensor", "latent")
ELSEWHERE = {  # what diffusers, and what the web UI's interface, call what has another name here
    "num_inference_steps": "steps", "num_images_per_prompt": "num_images", "generator": "seed, a number",
    "output_type": "output", "mask_image": "mask", "controlnet_conditioning_scale": "control_scale",
    "control_guidance_start": "control_start", "control_guidance_end": "control_end", "scheduler": "sampler",
    "timesteps": "sampler, a pair (function, Grid)", "sigmas": "sampler, a pair (function, Grid)",
    "cross_attention_kwargs": "pipe.load_lora(path, scale)", "cfg_scale": "guidance_scale", "cfg": "guidance_scale",
    "sampler_name": "sampler", "denoising_strength": "strength", "batch_size": "num_images", "init_image": "image",
    "prompt_embeds_2": "prompt_embeds, a pair (context, vec)", "negative_prompt_2": "negative_prompt",
    **dict.fromkeys(("callback", "callback_on_step_end"), "pipe.stream(…), which gives every step"),
    "return_dict": "nothing: the result is a list", "pooled_prompt_embeds": "prompt_embeds, a pair (context, vec)"}
CONTROLS = ("controlnet", "control_image", "control_scale", "control_start", "control_end", "guess_mode")


@dataclass(frozen=True)
class Settings:
    """What one call draws; the keyword arguments of `pipe(…)`, `pipe.img2img`, `pipe.inpaint`, `pipe.stream`.

    Args:
        negative_prompt: what to steer away from, one text or one per prompt; None is "".
        steps: of the sampler, 1 … 1000, of which `strength` may leave some out; a network call each (heun, dpmpp_sde:
            two). None: 25, by lcm 4.
        guidance_scale: e = e_uncond + scale·(e_cond − e_uncond); ≤ 1 is off: one conditional call per step. None: 7.5;
            by lcm 1, or 8.5 for a model that is told it (Luo et al. 2023, arXiv 2310.04378).
        guidance_rescale: share φ in [0, 1] of e that is scaled to the standard deviation of e_cond (2305.08891 eq. 16).
        sampler: None follows the checkpoint's scheduler; a name, what diffusers' class of that name makes of the same
            config (see `minidiff.sd.scheduler.named`: "dpmpp_2m_karras", or "DPM++ 2M Karras"); or a pair
            (function, Grid): then the grid counts the steps.
        seed: image i draws all its noise from one CPU generator seeded with seed + i, which is below 2³².
        height, width: in pixels; None: the size the model was trained at (img2img: the image's).
        num_images: per prompt.
        eta: share of fresh noise, in [0, 1], of ddim (None is 0), and of euler_ancestral, dpmpp_2m_sde and dpmpp_sde
            (None is 1).
        churn: of euler: how much noise is added back on the way (Karras et al. 2022, S_churn), at least 0; None is 0.
        clip_skip: leave out so many of the text encoder's last layers (for the prompt, not for the negative prompt).
        latents: unit noise (B,C,h,w) to start from instead of the seed's, which is drawn and left.
        prompt_embeds, negative_prompt_embeds: pairs (context (P,77,D), vec) as `pipe.text` gives, instead of texts.
        prompt_2: SDXL: what the second text encoder reads, one text or one per prompt; None: the prompt.
        original_size, target_size, crops_coords_top_left: SDXL: (height, width) of the picture before it was cropped
            and after, and (top, left) of the crop, as if it were a training picture; None: that of the result.
        long: read prompts beyond 77 tokens, in chunks of 75, instead of cutting them off.
        weights: read the prompts as AUTOMATIC1111's web UI does: (red:1.3) and (red) for more, [red] for less, BREAK
            for a new chunk of 75 tokens, of which there are as many as it takes, and <lora:file:0.8> for a LoRA in
            this call alone. See `minidiff.io.emphasis`.
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

    Whole numbers and numbers may be Python's, NumPy's or tensors of no axis; they are kept as Python's.

    Raises:
        ValueError: a value outside its range or of another type.

    >>> Settings(steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; it must be a whole number from 1 to 1000
    """

    negative_prompt: str | list[str] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | tuple[Callable, Grid] | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    eta: float | None = None
    churn: float | None = None
    clip_skip: int = 0
    latents: Tensor | None = None
    prompt_embeds: tuple[Tensor, Tensor | None] | None = None
    negative_prompt_embeds: tuple[Tensor, Tensor | None] | None = None
    prompt_2: str | list[str] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    long: bool = False
    weights: bool = False
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
        spans = {"steps": (1, 1000), "seed": (0, SEEDS - 1), "num_images": (1, 10**6), "clip_skip": (0, 100),
                 "height": (1, 2**20), "width": (1, 2**20), "tile": (1, 2**20)}
        for name, (low, high) in spans.items():
            if getattr(self, name) is not None or name not in ("steps", "height", "width", "tile"):
                self._set(name, whole(name, getattr(self, name), low, high))
        check_seeds(self.seed, self.num_images)
        for name in ("guidance_scale", "churn"):
            if getattr(self, name) is not None:
                self._set(name, number(name, getattr(self, name)))
        if (self.churn or 0) < 0:
            raise ValueError(f"churn is {self.churn:g}; it must be at least 0")
        for name in ("guidance_rescale", "eta", "strength"):
            if getattr(self, name) is not None or name == "guidance_rescale":
                self._set(name, number(name, getattr(self, name), share=True))
        for name in ("long", "weights"):
            self._set(name, truth(name, getattr(self, name)))
        if not (self.sampler is None or isinstance(self.sampler, str) or _is_pair(self.sampler)):
            raise ValueError(f"sampler is {self.sampler!r}; it must be a name or a pair (function, Grid)")
        if not isinstance(self.output, str) or self.output not in OUTPUTS:
            raise ValueError(f"output is {self.output!r}; it must be one of {', '.join(OUTPUTS)}")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs an image, of which it says what to repaint")
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            value = getattr(self, name)
            if value is not None or name == "crops_coords_top_left":
                pair = value if _is_two(value) else (None, None)
                text = f"{name} is {value!r}; it must be two whole numbers"
                self._set(name, tuple(whole(name, side, -2**20, 2**20, text) for side in pair))
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(self, name)
            if value is not None and not (_is_two(value) and isinstance(value[0], Tensor)
                                          and (value[1] is None or isinstance(value[1], Tensor))):
                raise ValueError(f"{name} is a {type(value).__name__}; it must be a pair (context, vec) of tensors, as "
                                 "pipe.text gives")
            if value is not None and (value[0].ndim != 3 or not len(value[0])):
                raise ValueError(f"{name} are {tuple(value[0].shape)}; they should be (prompts, tokens, width)")
        if self.latents is not None and not isinstance(self.latents, Tensor):
            raise ValueError(f"latents is a {type(self.latents).__name__}; it must be a tensor (B,C,h,w)")
        for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
            value = getattr(self, name)
            parts = value if isinstance(value, (tuple, list)) else [value]
            if not all(part is None or part.isfinite().all() for part in parts):
                raise ValueError(f"{name} hold NaN or infinite numbers")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("give either a negative_prompt or negative_prompt_embeds")
        if (self.controlnet is None) != (self.control_image is None):
            raise ValueError("controlnet and control_image go together: one of them is missing")
        self.controls  # checks them

    @classmethod
    def of(cls, **settings) -> Settings:
        """Settings by keyword, with a word of help where one has another name here.

        Raises:
            TypeError: there is no such setting. ValueError: see the class.

        >>> Settings.of(num_inference_steps=20)
        Traceback (most recent call last):
        TypeError: there is no setting num_inference_steps; here it is steps
        """
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, names, 1)
                more = f"; here it is {near[0]}" if near else f"; there are {', '.join(names)}"
                raise TypeError(f"there is no setting {name}{more}")
        return cls(**settings)

    def settled(self, lcm: bool, told: bool) -> Settings:
        """The same, with the numbers of a run where they were left open.

        Args:
            lcm: whether it samples by lcm. told: whether the model is told the guidance scale.

        >>> Settings().settled(lcm=False, told=False).steps, Settings(steps=8).settled(lcm=True, told=True).steps
        (25, 8)
        """
        steps, scale = (4, 8.5 if told else 1.0) if lcm else (25, 7.5)
        return replace(self, steps=self.steps or steps,
                       guidance_scale=scale if self.guidance_scale is None else self.guidance_scale)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def taken(self) -> float:
        """The share of the steps that are taken with `image`.

        >>> Settings(strength=0.3).taken, Settings().taken
        (0.3, 0.6)
        """
        return self.strength if self.strength is not None else 0.6 if self.mask is None else 1.0

    @property
    def controls(self) -> list[tuple]:
        """For each ControlNet: net, picture, scale, start, end, guess mode.

        Raises:
            ValueError: lists of different lengths, or shares that are none.
        """
        if self.controlnet is None:
            return []
        values = [getattr(self, name) for name in CONTROLS]
        if isinstance(self.controlnet, (list, tuple)):
            n = len(self.controlnet)
            columns = {name: list(value) if isinstance(value, (list, tuple)) else [value] * n
                       for name, value in zip(CONTROLS, values)}
            if bad := [f"{len(column)} {name}s" for name, column in columns.items() if len(column) != n]:
                raise ValueError(f"there are {n} controlnets, but {', '.join(bad)}")
            rows = list(zip(*columns.values()))
        else:
            rows = [tuple(values)]
        checked = []
        for net, picture, *numbers, guess in rows:
            scale, start, end = (number(name, value) for name, value in zip(CONTROLS[2:5], numbers))
            if not 0 <= start < end <= 1:
                raise ValueError(f"control_start and control_end are {start:g} and {end:g}; they must be two shares "
                                 "0 ≤ start < end ≤ 1")
            checked.append((net, picture, scale, start, end, truth("guess_mode", guess)))
        return checked


def check_seeds(seed: int, pictures: int) -> None:
    """ValueError unless there is a seed for each picture, the first of which has `seed`.

    >>> check_seeds(2**32 - 2, 3)
    Traceback (most recent call last):
    ValueError: seed is 4294967294, and the last of 3 pictures would have 4294967296; seeds end at 4294967295
    """
    if seed + pictures > SEEDS:
        raise ValueError(f"seed is {seed}, and the last of {pictures} pictures would have {seed + pictures - 1}; "
                         f"seeds end at {SEEDS - 1}")


def _is_two(value: object) -> bool:
    return (isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) == 1) and len(value) == 2


def _is_pair(sampler: object) -> bool:
    return isinstance(sampler, tuple) and len(sampler) == 2 and callable(sampler[0]) and isinstance(sampler[1], Grid)

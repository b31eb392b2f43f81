"""Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752): text encoder, U-Net and VAE, joined into one call."""
from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff import grid, guidance, samplers
from minidiff.io.images import check_sides, latent_colors, to_pil, to_rgb, to_tensor, to_unit
from minidiff.io.weights import read_json, weights_dir, write_atomic
from minidiff.nets.attention import Kept
from minidiff.nets.packed import packed
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.prediction import denoiser
from minidiff.samplers import Step
from minidiff.schedule import Discrete
from minidiff.settings import Settings
from minidiff.text import Text, lost_words, save_tokenizer

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.settings import Picture

KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}  # diffusers' name -> ours
CLASSES = {name: theirs for theirs, name in samplers.NAMES.items()}  # sampler -> diffusers' class
FULL_PREVIEW = 128 * 128  # pixels up to which a preview is a true decode


class StableDiffusion:
    """Pictures from prompts, by latent diffusion with classifier-free guidance.

    Matches: diffusers' StableDiffusionPipeline and StableDiffusionImg2ImgPipeline with one generator per image, pixels
    to 1e-4 (tests/parity/test_pipeline.py).

    >>> pipe = StableDiffusion.from_pretrained("mini-sd")
    >>> pipe(["a red house", "a blue boat, sea"], steps=2, num_images=2, output="tensor").shape
    torch.Size([4, 3, 64, 64])
    """

    def __init__(self, text: Text, unet: UNet, vae: VAE, scheduler: dict):
        self.text, self.unet, self.vae = text, unet, vae
        # NOTE: diffusers' pipeline forces these two onto the scheduler it is given: test_pipeline_forces_steps_offset.
        self.scheduler = {**scheduler, "steps_offset": 1, "clip_sample": False}
        self.schedule = Discrete.from_config(self.scheduler)
        kind = self.scheduler.get("prediction_type", "epsilon")
        if kind not in KINDS:
            raise ValueError(f"prediction_type is {kind!r}; supported are {', '.join(KINDS)}")
        self.kind = KINDS[kind]
        self._colors: Tensor | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, *, variant: str | None = None,
                        device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Load a model.

        Args:
            source: "mini-sd", which ships with the package, or a folder in diffusers' layout (SD 1.x and 2.x).
            variant: tag of the weight files, such as "fp16".
            device: None: cuda, else mps, else cpu.
            dtype: of the weights and the networks' arithmetic; None: float32. In float16 the VAE stays float32.

        Raises:
            FileNotFoundError: there is no such model, or a part of it is missing.
            ValueError: a file is garbled, does not fit, holds NaN, or is of another kind of model.
        """
        folder = weights_dir() / source if source == "mini-sd" else Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no model folder {source}; give one, or mini-sd, which ships here")
        family = read_json(folder / "model_index.json").get("_class_name")
        if family not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
            raise ValueError(f"{folder} is a {family}; supported is StableDiffusionPipeline")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        options = {"variant": variant, "device": device or default_device()}
        return cls(Text.from_pretrained(folder, **options, dtype=dtype),
                   UNet.from_pretrained(folder / "unet", **options, dtype=dtype),
                   VAE.from_pretrained(folder / "vae", **options, dtype=vae_dtype(dtype)), scheduler)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move the networks and change their dtype, in place."""
        self.text.to(device=device, dtype=dtype)
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=vae_dtype(dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def size(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.unet.config.sample_size * self.vae.factor

    def __call__(self, prompt: str | list[str] | None = None, **settings) -> list[Image.Image] | Tensor:
        """Draw pictures of prompts.

        Args:
            prompt: one text or several; None with `prompt_embeds`.
            **settings: see `Settings`.

        Returns:
            prompts × num_images pictures, those of the first prompt first.

        Raises:
            ValueError: a setting out of its range, or of a form that does not fit the model or the others.
        """
        s = Settings(**settings)
        for step in self._run(self._prepare(prompt, s)):
            z = step.x
        if s.output == "latent":
            return z
        image = to_unit(self.decode(z))
        return image if s.output == "tensor" else to_pil(image)

    def img2img(self, prompt: str | list[str] | None, image: Picture, *, strength: float = 0.6,
                **settings) -> list[Image.Image] | Tensor:
        """Redraw a picture as the prompt says (SDEdit, Meng et al. 2021, arXiv 2108.01073): noise it, then denoise it.

        The last int(steps·strength) steps are taken, from x = alpha·z0 + sigma·noise, z0 the picture's latent.

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> pipe.img2img("a red house", torch.zeros(3, 64, 64), strength=0.5, steps=4)[0].size
        (64, 64)
        """
        return self(prompt, image=image, strength=strength, **settings)

    def stream(self, prompt: str | list[str] | None = None, **settings) -> Iterator[Step]:
        """The same run, step by step: level, state x and guess x0, as the sampler yields them (steps + 1 of them).

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> [round(step.level.sigma, 2) for step in pipe.stream("a red house", steps=3)]
        [0.95, 0.68, 0.04, 0.03]
        """
        return self._run(self._prepare(prompt, Settings(**settings)))

    @torch.inference_mode()
    def preview(self, z: Tensor) -> list[Image.Image]:
        """Pictures of latents on the way, x0 or x: decoded where that is cheap, else by a linear map, enlarged."""
        side = self.vae.factor
        if z.shape[-1] * z.shape[-2] * side**2 <= FULL_PREVIEW:
            return to_pil(to_unit(self.decode(z)))
        if self._colors is None:
            weight = next(self.vae.parameters())
            self._colors = latent_colors(lambda image: self.vae.encode(image.to(weight)).float(), side)
        image = to_rgb(z.float(), self._colors.to(z.device))
        return to_pil(torch.nn.functional.interpolate(image, scale_factor=side, mode="bilinear"))

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) to pictures (B,3,H,W) in about [−1, 1], a megapixel at a time to save memory.

        Raises:
            ValueError: the result is not finite.
        """
        at_once = max(1, 2**20 // (z.shape[-1] * z.shape[-2] * self.vae.factor**2))
        weight = next(self.vae.parameters())
        image = torch.cat([self.vae.decode(part.to(weight)).float() for part in z.split(at_once)])
        if not image.isfinite().all():
            raise ValueError("the picture holds NaN or infinite numbers; try a lower guidance scale, or dtype float32")
        return image

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model in diffusers' layout: safetensors, configs, tokenizer, model_index.json.

        Args:
            dtype: of the numbers in the files; None: that of the networks.
        """
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet", dtype)
        self.vae.save_pretrained(folder / "vae", dtype)
        self.text.encoder.save_pretrained(folder / "text_encoder", dtype)
        save_tokenizer(self.text.tokenizer, folder / "tokenizer")
        parts = {"scheduler": ["diffusers", self.scheduler["_class_name"]], "vae": ["diffusers", "AutoencoderKL"],
                 "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                 "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None],
                 "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **parts}
        for path, values in (("scheduler/scheduler_config.json", self.scheduler), ("model_index.json", index)):
            write_atomic(folder / path, json.dumps(values, indent=2) + "\n")

    @torch.inference_mode()
    def _prepare(self, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
        """Check everything, encode prompts and image, draw the first noise; return the sampler, not yet begun."""
        sampler, levels, options = self._plan(s)
        cond, uncond = self._conditions(prompt, s)
        generators = [torch.Generator().manual_seed(s.seed + i) for i in range(len(cond["context"]))]
        z0 = None if s.image is None else self._latents(s, generators)
        if z0 is None:
            sides = (s.height or self.size, s.width or self.size)
            check_sides(sides, self.vae.factor)
            shape = (len(generators), self.vae.config.latent_channels, *(side // self.vae.factor for side in sides))
        else:
            shape = tuple(z0.shape)
        if s.latents is not None and s.latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(s.latents.shape)}; it should be {shape}")
        z = draw(generators, shape).to(self.device) if s.latents is None else s.latents.to(self.device, torch.float32)
        x = levels.start(z) if z0 is None else levels[0].alpha * z0 + levels[0].sigma * z
        net = self._net()
        if uncond is None:
            net = functools.partial(net, **cond)
        else:
            net = guidance.cfg(net, cond, uncond, s.guidance_scale, s.guidance_rescale)
        if "noise" in inspect.signature(sampler).parameters:
            options["noise"] = lambda like: draw(generators, like.shape).to(like)
        return sampler(denoiser(net, self.kind), x, levels, **options)

    @torch.inference_mode()
    def _run(self, steps: Iterator[Step]) -> Iterator[Step]:
        with packed(self.unet):
            yield from steps

    def _net(self) -> Callable:
        """The U-Net in its own dtype on a float32 state; a prompt's keys and values are computed only once."""
        kept, dtype = functools.cache(Kept), self.unet.conv_in.weight.dtype
        return lambda x, t, context, **cond: self.unet(x.to(dtype), t, kept(context), **cond).float()

    def _plan(self, s: Settings) -> tuple[Callable, grid.Grid, dict]:
        """Sampler, grid (cut to `strength`) and the sampler's options."""
        if isinstance(s.sampler, tuple):
            sampler, levels = s.sampler
            options = {}
        else:
            config = self.scheduler
            if s.sampler is not None:
                if s.sampler not in CLASSES:
                    raise ValueError(f"unknown sampler {s.sampler!r}; there are {', '.join(CLASSES)}")
                config = {**config, "_class_name": CLASSES[s.sampler]}
            sampler, options = samplers.from_config(config)
            levels = grid.from_diffusers(config, s.steps, self.schedule)
        if s.eta is not None:
            if sampler is not samplers.ddim:
                raise ValueError(f"eta belongs to ddim; the sampler is {getattr(sampler, '__name__', sampler)}")
            options = {**options, "eta": s.eta}
        if s.image is not None:
            n = len(levels) - 1
            taken = int(n * s.strength)
            if taken < 1:
                raise ValueError(f"strength {s.strength} of {n} steps leaves no step; take more of either")
            levels = levels[n - taken:]
        return sampler, levels, dict(options)

    def _conditions(self, prompt: str | list[str] | None, s: Settings) -> tuple[dict, dict | None]:
        """What the U-Net is told with and, unless guidance is off, without the prompt: one row per picture."""
        if (prompt is None) == (s.prompt_embeds is None):
            raise ValueError("give either a prompt or prompt_embeds")
        context, vec = s.prompt_embeds or self._encode(prompt, s.clip_skip)
        if s.guidance_scale <= 1:
            return self._rows(context, vec, s.num_images), None
        if s.negative_prompt_embeds is not None:
            other = s.negative_prompt_embeds
        else:
            other = self._encode(s.negative_prompt or "", 0)
        if len(other[0]) not in (1, len(context)):
            raise ValueError(f"there are {len(context)} prompts, but {len(other[0])} negative prompts")
        other = [part if part is None else part.expand(len(context), *part.shape[1:]) for part in other]
        return self._rows(context, vec, s.num_images), self._rows(*other, s.num_images)

    def _encode(self, prompts: str | list[str], clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """Each different text once."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"a prompt is a text or a list of at least one text, not {prompts!r}")
        texts = list(dict.fromkeys(prompts))
        for text in texts:
            if lost := lost_words(self.text.tokenizer, text):
                warnings.warn(f"the prompt is longer than 77 tokens; left out: {lost}", stacklevel=2)
        rows = [texts.index(prompt) for prompt in prompts]
        context, vec = self.text(texts, clip_skip=clip_skip)
        return context[rows], None if vec is None else vec[rows]

    def _rows(self, context: Tensor, vec: Tensor | None, n: int) -> dict[str, Tensor]:
        width = self.unet.config.cross_attention_dim
        if context.ndim != 3 or context.shape[2] != width:
            raise ValueError(f"prompt_embeds are {tuple(context.shape)}; they should be (prompts, tokens, {width})")
        parts = {"context": context} if vec is None else {"context": context, "vec": vec}
        return {name: part.to(self.unet.conv_in.weight).repeat_interleave(n, 0) for name, part in parts.items()}

    def _latents(self, s: Settings, generators: list[torch.Generator]) -> Tensor:
        """A sample of the init image's latents for each picture, (B,C,h,w) float32."""
        image = to_tensor(s.image, s.height, s.width, self.vae.factor)
        if len(image) not in (1, len(generators) // s.num_images):
            raise ValueError(f"there are {len(generators) // s.num_images} prompts, but {len(image)} images")
        # NOTE: image p belongs to prompt p; diffusers deals images out in turn: test_images_follow_their_prompts.
        image = image.repeat_interleave(len(generators) // len(image), 0).to(next(self.vae.parameters()))
        shape = (len(image), self.vae.config.latent_channels, *(side // self.vae.factor for side in image.shape[-2:]))
        return self.vae.encode(image, noise=draw(generators, shape).to(image)).float()


def default_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def vae_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """In float16 the decoders of Stable Diffusion overflow to black pictures: float32 then."""
    return torch.float32 if dtype == torch.float16 else dtype


def draw(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B,…) float32 on the CPU, row i from generator i: it does not depend on the batch or the device.

    >>> draw([torch.Generator().manual_seed(0)], (1, 2))
    tensor([[ 1.5410, -0.2934]])
    """
    return torch.cat([torch.randn(1, *shape[1:], generator=generator) for generator in generators])

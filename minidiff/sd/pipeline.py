"""Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752): text encoder, U-Net and VAE, joined into one call.

It is these ten lines; the rest of this folder loads models, checks settings, reads schedulers, and is fast.

>>> from minidiff import grid, guidance, prediction, samplers
>>> pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
>>> with torch.inference_mode():
...     prompt = "a large red house on the left, snow, night, stars"
...     given, nothing = ({"context": pipe.text([words])[0]} for words in (prompt, ""))  # what the U-Net is told
...     net = guidance.cfg(pipe.unet, given, nothing, scale=7.5)             # away from nothing, towards the prompt
...     denoise = prediction.denoiser(net, pipe.kind)                        # its guess of picture and noise
...     levels = grid.Grid((t, *pipe.schedule(t)) for t in (*range(961, 0, -40), 0))     # 25 steps down
...     z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
...     *_, last = samplers.ddim(denoise, levels.start(z), levels)           # from noise to the latent of a picture
...     image = to_unit(pipe.vae.decode(last.x))                             # 16×16×4 numbers to 128×128×3
>>> torch.testing.assert_close(image, pipe(prompt, output="tensor"), atol=1e-4, rtol=0)
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.grid import Step
from minidiff.io.embeddings import load_embedding
from minidiff.io.emphasis import cut_loras
from minidiff.io.hub import find_adapter
from minidiff.io.images import enlarged, latent_colors, to_pil, to_rgb, to_unit
from minidiff.io.lora import load_lora
from minidiff.sd.conditions import texts
from minidiff.sd.memory import MEGAPIXEL
from minidiff.sd.models import Model
from minidiff.sd.run import check_finite, run
from minidiff.sd.settings import Settings
from minidiff.text import add_word, check_word
from minidiff.values import number

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.sd.settings import Picture

FULL_PREVIEW = 128 * 128  # pixels up to which a preview is a true decode


class StableDiffusion(Model):
    """Pictures from prompts, by latent diffusion with classifier-free guidance.

    pipe(prompt, …), pipe.img2img(prompt, image, …), pipe.inpaint(prompt, image, mask, …) and pipe.two_pass(prompt, …)
    draw; pipe.stream(prompt, …) shows every step. Their keyword arguments: help(md.Settings). What is loaded into it:
    pipe.load_lora, pipe.load_textual_inversion; memory and speed: pipe.to, pipe.offload, pipe.compile; its parts,
    pipe.text, pipe.unet, pipe.vae, pipe.schedule: see `Model`.

    Matches: diffusers' StableDiffusionPipeline, LatentConsistencyModelPipeline and StableDiffusionXLPipeline and their
    img2img and inpainting siblings, with one generator per image, pixels to 1e-4 (tests/parity/test_families.py).

    >>> pipe = StableDiffusion.from_pretrained("mini-sd")
    >>> pipe(["a red house", "a blue boat, sea"], steps=2, num_images=2, output="tensor").shape
    torch.Size([4, 3, 128, 128])
    """

    _colors: Tensor | None = None  # of the linear map for previews, see `latent_colors`; None: not yet needed

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
        s = Settings.of(**settings)
        for step in self._run(prompt, s):
            z = step.x
        if s.output == "latent":
            return z
        image = to_unit(self.decode(z, s.tile))
        return image if s.output == "tensor" else to_pil(image)

    def img2img(self, prompt: str | list[str] | None, image: Picture, *, strength: float | None = None,
                **settings) -> list[Image.Image] | Tensor:
        """Redraw a picture as the prompt says (SDEdit, Meng et al. 2021, arXiv 2108.01073): noise it, then denoise it.

        The last int(steps·strength) steps are taken, from x = alpha·z0 + sigma·noise, z0 the picture's latent; a latent
        consistency model takes all, see `minidiff.sd.conditions.plan`.
        NOTE: lms and plms start afresh there, not amid a history that is not theirs as in diffusers:
        test_a_slice_starts_plms_with_two_calls.

        Raises:
            ValueError: there is no image, or as `__call__`.

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> pipe.img2img("a red house", torch.zeros(3, 128, 128), strength=0.5, steps=4)[0].size
        (128, 128)
        """
        if image is None:
            raise ValueError("img2img needs an image to start from")
        return self(prompt, image=image, strength=strength, **settings)

    def inpaint(self, prompt: str | list[str] | None, image: Picture, mask: Picture, *, strength: float | None = None,
                **settings) -> list[Image.Image] | Tensor:
        """Repaint the part of a picture where the mask is white, with an inpainting model or with any other.

        A U-Net of 9 channels is told the mask and the rest of the picture; with one of 4, the rest is put back, as
        noisy as the state, before each call. Either way, decoding leaves it not quite the same.
        NOTE: each picture has noise of its own for the VAE; diffusers draws it for the first alone:
        test_an_inpainted_picture_depends_on_its_seed_alone.

        Raises:
            ValueError: there is no image or no mask, or as `__call__`.

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> pipe.inpaint("a red house", torch.zeros(3, 128, 128), torch.eye(128), steps=2)[0].size
        (128, 128)
        """
        if image is None or mask is None:
            raise ValueError("inpaint needs an image, and a mask of what to repaint in it")
        return self(prompt, image=image, mask=mask, strength=strength, **settings)

    def two_pass(self, prompt: str | list[str], *, scale: float = 2.0, strength: float | None = None,
                 **settings) -> list[Image.Image] | Tensor:
        """Draw larger pictures than the model was trained for: draw, enlarge (bicubic), redraw at a low strength.

        The first pass settles what is where, at the size at which the model knows it; the second adds detail, from
        x = alpha·z0 + sigma·noise. Drawn large at once, a model repeats its objects. The web UI's "hires. fix".

        Args:
            scale: of the sides. strength: how much of the enlarged picture is redrawn, in (0, 1]; None: 0.3. Full
                models bear up to 0.5; mini-sd, which knows objects of one size, draws smaller ones into them.
            **settings: see `Settings`; height and width are those of the first pass.

        Raises:
            ValueError: scale is not positive, there is an image to start from already, or as `__call__`.

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> pipe.two_pass("a red house", scale=1.5, steps=4)[0].size
        (192, 192)
        """
        if not (number("scale", scale) > 0 and settings.get("image") is None and settings.get("latents") is None):
            raise ValueError("two_pass takes a positive scale, and starts from noise of its own, not from an image")
        s = self.settled(Settings.of(image=torch.zeros(3, 1, 1), strength=strength, **settings))
        strength = redrawn(s.steps, strength)                                                # checked before the work
        prompts = [text for text in texts(prompt) for _ in range(s.num_images)]
        settings |= {"num_images": 1}
        image = enlarged(self(prompts, **settings | {"output": "tensor"}), scale, self.vae.factor)
        height, width = image.shape[-2:]
        return self.img2img(prompts, image, strength=strength, **settings | {"height": height, "width": width})

    def stream(self, prompt: str | list[str] | None = None, **settings) -> Iterator[Step]:
        """The same run, step by step: level, state x and guess x0, as the sampler yields them (steps + 1 of them).

        >>> pipe = StableDiffusion.from_pretrained("mini-sd")
        >>> [round(step.level.sigma, 2) for step in pipe.stream("a red house", steps=3)]
        [0.95, 0.68, 0.04, 0.03]
        """
        return self._run(prompt, Settings.of(**settings))

    def _run(self, prompt: str | list[str] | None, s: Settings) -> Iterator[Step]:
        """A run, with the LoRAs that its prompts name in the weights while these are read and while steps are taken."""
        loras = []
        if s.weights and prompt is not None:
            cut = [cut_loras(text) for text in texts(prompt)]
            if any(named != cut[0][1] for _, named in cut):
                raise ValueError("the prompts of one call name different LoRAs; give each a call of its own")
            prompt = [text for text, _ in cut]
            loras = [(load_lora(_lora_file(name), self.loras.parts), scale) for name, scale in cut[0][1]] if cut else []
        if not loras:
            return run(self, prompt, s)
        with self._lent(loras):
            steps = run(self, prompt, s)
        return self._taken(steps, loras)

    def _taken(self, steps: Iterator[Step], loras: list[tuple]) -> Iterator[Step]:
        with self._lent(loras):
            yield from steps

    @contextmanager
    def _lent(self, loras: list[tuple]) -> Iterator[None]:
        handles = [self.loras.add(lora, scale) for lora, scale in loras]
        try:
            yield
        finally:
            for handle in reversed(handles):
                self.loras.remove(handle)

    @torch.inference_mode()
    def preview(self, z: Tensor) -> list[Image.Image]:
        """Pictures of latents on the way, x0 or x: decoded where that is cheap, else by a linear map, enlarged."""
        side = self.vae.factor
        if z.shape[-1] * z.shape[-2] * side**2 <= FULL_PREVIEW:
            return to_pil(to_unit(self.decode(z)))
        if self._colors is None:
            with self.at_work(self.vae) as vae:
                weight = next(vae.parameters())
                self._colors = latent_colors(lambda image: vae.encode(image.to(weight)).float(), side)
        image = to_rgb(z.float(), self._colors.to(z.device))
        return to_pil(torch.nn.functional.interpolate(image, scale_factor=side, mode="bilinear"))

    @torch.inference_mode()
    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Scaled latents (B,C,h,w) to pictures (B,3,H,W) in about [−1, 1], a megapixel at a time to save memory.

        Args:
            tile: as in `VAE.decode`.

        Raises:
            ValueError: the result is not finite.
        """
        at_once = max(1, MEGAPIXEL // (z.shape[-1] * z.shape[-2] * self.vae.factor**2))
        with self.at_work(self.vae) as vae:
            weight = next(vae.parameters())
            image = torch.cat([vae.decode(part.to(weight), tile).float() for part in z.split(at_once)])
        check_finite(self, image)
        return image

    def load_lora(self, path: str | Path, scale: float = 1.0) -> int:
        """Add a LoRA to the weights, on top of those loaded before; see `minidiff.io.lora`.

        Args:
            path: kohya's, diffusers' or PEFT's file; or "cat", "watercolour" or "lcm", which ship for mini-sd.
            scale: how much of it: 0 nothing, 1 as trained.

        Returns:
            A handle for `unload_lora`.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, holds no LoRA, or one of another model or kind, or
                the scale is no finite number.
        """
        scale = number("scale", scale)
        return self.loras.add(load_lora(find_adapter(path), self.loras.parts), scale)

    def unload_lora(self, handle: int | None = None) -> None:
        """Take a LoRA, or all of them, out of the weights, which are then what they were, bit for bit."""
        self.loras.remove(handle)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Learn a new word for prompts from a file; returns the word. It is not saved with the model.

        Args:
            path: see `minidiff.io.embeddings.load_embedding`; or "cat", which ships for mini-sd.
            token: the word; None: the one in the file, else the file's name.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, is no textual inversion, or of another family.
        """
        word, parts = load_embedding(find_adapter(path), token)
        if len(parts) != len(self.text.encoders):
            raise ValueError(f"{path} was made for {len(parts)} text encoder(s); this model has "
                             f"{len(self.text.encoders)}")
        places = list(zip(self.text.tokenizers, self.text.encoders, parts))
        for teach in (check_word, add_word):                                 # to all encoders, or to none
            for tokenizer, encoder, vectors in places:
                teach(tokenizer, encoder, word, vectors)
        return word


def redrawn(steps: int, strength: float | None) -> float:
    """The strength of a second pass; None: 0.3, or what makes one step.

    Raises:
        ValueError: it leaves no step.

    >>> redrawn(25, None), redrawn(2, None)
    (0.3, 0.5)
    """
    strength = max(0.3, 1 / steps) if strength is None else strength
    if int(steps * strength) < 1:
        raise ValueError(f"strength {strength:g} of {steps} steps leaves none to the second pass; take more of either")
    return strength


def _lora_file(name: str) -> Path:
    """The file that a prompt means: with its ending or without."""
    path = find_adapter(name)
    return path if path.exists() or path.suffix else path.with_name(f"{path.name}.safetensors")

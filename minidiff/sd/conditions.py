"""What a run of Stable Diffusion starts from: settings, prompts and pictures, checked, as one row per picture drawn."""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidiff import grid, samplers
from minidiff.io.checkpoint import scheduler_config
from minidiff.io.emphasis import looks_weighted
from minidiff.nets.unet import UNetConfig, micro_conditioning
from minidiff.schedule import Discrete
from minidiff.sd import scheduler
from minidiff.sd.settings import Settings
from minidiff.text import Text, lost_words

Pair = tuple[Tensor, Tensor | None]  # context (P,N,D) and vec (P,V) of P prompts, as `Text` gives them


def plan(config: dict[str, Any], schedule: Discrete, s: Settings,
         spreads: bool = False) -> tuple[Callable, grid.Grid, dict, float | None]:
    """Sampler, grid (cut to `strength`), the sampler's options, and where x0 is clipped, if at all.

    Args:
        config: the model's `scheduler_config.json`. schedule: its noise levels.
        spreads: whether img2img by lcm takes all steps, spread over those for which the model was distilled and that
            `strength` leaves; else it takes the last int(steps·strength).

    Raises:
        ValueError: an unknown or unsupported sampler, or settings that do not fit it.

    >>> plan(scheduler.SD_CONFIG, scheduler.SD, Settings(sampler="euler", steps=4))[1].n
    4
    """
    clipped = None
    if isinstance(s.sampler, tuple):
        sampler, levels = s.sampler
        options = scheduler.timed(sampler, schedule)
    else:
        if s.sampler is not None:
            # plms is PNDM without the Runge-Kutta steps, which are off in Stable Diffusion's configs
            config = {"skip_prk_steps": True, **config, **scheduler.named(s.sampler)}
        sampler, options = scheduler.from_config(config)
        levels = scheduler.from_diffusers(config, s.steps, schedule)
        clipped = scheduler.clip_range(config)
    if s.churn:
        if sampler is not samplers.euler:
            raise ValueError(f"churn belongs to euler; the sampler is {getattr(sampler, '__name__', sampler)}")
        sampler = samplers.euler_churn
        options = {**options, "churn": s.churn, **scheduler.timed(sampler, schedule)}
    if s.eta is not None:
        if "eta" not in inspect.signature(sampler).parameters:
            raise ValueError(f"eta belongs to {', '.join(samplers.ETA)}; the sampler is "
                             f"{getattr(sampler, '__name__', sampler)}")
        options = {**options, "eta": s.eta}
    if s.image is None and s.strength is not None:
        raise ValueError("strength needs an image, of which it says how much is drawn anew")
    if s.image is not None:
        spreads = spreads and sampler is samplers.lcm and s.mask is None and not isinstance(s.sampler, tuple)
        if spreads:
            most = scheduler_config(config).get("original_inference_steps", 50)
            levels = scheduler.from_diffusers(config, most, schedule)
        n = len(levels) - 1
        taken = int(n * s.taken)
        if taken < 1:
            more = "of either" if s.taken >= 0.001 else "strength"                  # there are at most 1000 steps
            raise ValueError(f"strength {s.taken:g} of {n} steps leaves no step; take more {more}")
        levels = grid.spread(levels[n - taken:], s.steps) if spreads else levels[n - taken:]
    return sampler, levels, dict(options), clipped


def encode(text: Text, prompt: str | list[str] | None, s: Settings, *, guided: bool,
           zeros: bool) -> tuple[Pair, Pair | None]:
    """(context, vec) of each prompt and, if guided, of what stands against it.

    Args:
        zeros: whether no negative prompt means zeros (SDXL); else it means "".

    Raises:
        ValueError: no prompt, or one of another form or number than the others.
    """
    if (prompt is None) == (s.prompt_embeds is None):
        raise ValueError("give either a prompt or prompt_embeds")
    if s.prompt_2 is not None and (prompt is None or len(text.encoders) < 2):
        raise ValueError("prompt_2 is the second of two text encoders' (SDXL), beside a prompt")
    prompts, second, negative = (texts(p) for p in (prompt, s.prompt_2, s.negative_prompt or ""))
    if second and len(second) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(second)} in prompt_2")
    zeros = zeros and s.negative_prompt is None
    said = [*prompts, *second, *(negative if guided and not zeros else [])]
    if not s.weights and (letters := next(filter(None, map(looks_weighted, said)), None)):
        warnings.warn(f"{letters} is read as letters; with weights=True it is read as in AUTOMATIC1111's web UI",
                      stacklevel=2)
    chunks = max((text.chunks(words, s.weights) for words in said), default=1) if s.long or s.weights else 1
    given = s.prompt_embeds or _encode(text, prompts, second or prompts, s.clip_skip, chunks, s.weights)
    if not guided:
        return given, None
    if s.negative_prompt_embeds is not None:
        against = s.negative_prompt_embeds
    elif zeros:
        against = tuple(part if part is None else torch.zeros_like(part) for part in given)
    else:
        against = _encode(text, negative, negative, 0, chunks, s.weights)
    if len(against[0]) not in (1, len(given[0])):
        raise ValueError(f"there are {len(given[0])} prompts, but {len(against[0])} negative prompts")
    if given[0].ndim == against[0].ndim == 3 and given[0].shape[1] != against[0].shape[1]:
        raise ValueError(f"prompt_embeds have {given[0].shape[1]} tokens, negative_prompt_embeds "
                         f"{against[0].shape[1]}; they need as many")
    return given, tuple(part if part is None else part.expand(len(given[0]), *part.shape[1:]) for part in against)


def rows(pair: Pair, config: UNetConfig, s: Settings, sides: tuple[int, int]) -> dict[str, Tensor]:
    """What the U-Net is told, a row for each picture: `context` and, where it has a place for them, `vec` and `w`.

    Raises:
        ValueError: embeddings that do not fit the U-Net.
    """
    context, vec = pair
    width = config.cross_attention_dim
    if context.ndim != 3 or context.shape[2] != width:
        raise ValueError(f"embeddings of prompts are {tuple(context.shape)}; they should be (prompts, tokens, {width})")
    parts = {"context": context}
    if config.addition_embed_type:
        sizes = torch.tensor([[*(s.original_size or sides), *s.crops_coords_top_left, *(s.target_size or sides)]])
        if vec is None or vec.shape != (len(context), config.pooled):
            shape = vec if vec is None else tuple(vec.shape)
            raise ValueError(f"prompt_embeds are pairs (context, vec); vec is {shape}, not ({len(context)}, "
                             f"{config.pooled})")
        sizes = sizes.to(vec.device).expand(len(vec), -1)
        parts["vec"] = micro_conditioning(vec, sizes, config.addition_time_embed_dim)
    elif s.original_size or s.target_size or any(s.crops_coords_top_left):
        raise ValueError("original_size, target_size and crops_coords_top_left are for SDXL, not for this model")
    if config.time_cond_proj_dim:
        parts["w"] = torch.full((len(context),), s.guidance_scale - 1, device=context.device)
    return {name: part.repeat_interleave(s.num_images, 0) for name, part in parts.items()}


def draw(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B,…) float32 on the CPU, row i from generator i: it does not depend on the batch or the device.

    >>> draw([torch.Generator().manual_seed(0)], (1, 2))
    tensor([[ 1.5410, -0.2934]])
    """
    return torch.cat([torch.randn(1, *shape[1:], generator=generator) for generator in generators])


def texts(prompts: str | list[str] | None) -> list[str]:
    """One text or several as a list, of none an empty one.

    Raises:
        ValueError: something else.

    >>> texts("a red house"), texts(None)
    (['a red house'], [])
    """
    prompts = [prompts] if isinstance(prompts, str) else [] if prompts is None else prompts
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"a prompt is a text or a list of at least one text, not {prompts!r}")
    return list(prompts)


def _encode(text: Text, prompts: list[str], second: list[str], clip_skip: int, chunks: int, weights: bool) -> Pair:
    """Each different pair of texts once."""
    if not prompts:
        raise ValueError("a prompt is a text or a list of at least one text, not []")
    pairs = list(zip(prompts, second))
    different = list(dict.fromkeys(pairs))
    for words in dict.fromkeys(word for pair in different for word in pair):
        if chunks == 1 and not weights and (lost := lost_words(text.tokenizers[0], words)):
            warnings.warn(f"the prompt is longer than 77 tokens; left out: {lost}", stacklevel=2)
    context, vec = text([a for a, _ in different], clip_skip, prompts_2=[b for _, b in different], chunks=chunks,
                        weights=weights)
    at = [different.index(pair) for pair in pairs]
    return context[at], None if vec is None else vec[at]

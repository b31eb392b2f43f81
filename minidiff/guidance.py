"""Guidance: wrappers of nets (classifier-free, ControlNet) and of denoisers (classifier, clipping), which steer."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor

from minidiff.grid import Step
from minidiff.prediction import Pred
from minidiff.schedule import Level
from minidiff.values import number


def cfg(net: Callable, cond: dict[str, Tensor], uncond: dict[str, Tensor], scale: float,
        rescale: float = 0.0) -> Callable:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, Stable Diffusion's convention), one batch of 2B.

        out = uncond + scale·(cond − uncond);   scale 0: unconditional, 1: conditional, above: more than the data says

    Args:
        net: (x (B,...), t, **cond) -> out. cond, uncond: its keyword tensors, B rows each.
        rescale: share φ of the result whose standard deviation per picture is set to that of the conditional output
            (Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16).

    >>> net = lambda x, t, c: c
    >>> cfg(net, {"c": torch.tensor([3.0])}, {"c": torch.tensor([1.0])}, 2.0)(torch.zeros(1), 0.0)
    tensor([5.])
    """
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}

    def guided(x: Tensor, t: float) -> Tensor:
        without, given = net(torch.cat([x, x]), t, **both).chunk(2)
        out = without + scale * (given - without)
        if rescale:
            axes = tuple(range(1, x.ndim))
            out = out * (1 - rescale + rescale * given.std(axes, keepdim=True) / out.std(axes, keepdim=True))
        return out

    return guided


def controlled(net: Callable, controlnet: Callable, hint: Tensor, scale: float | Iterable[float] = 1.0, *,
               guess: bool = False) -> Callable:
    """A U-Net that a ControlNet adds to (Zhang et al. 2023, arXiv 2302.05543). Several: wrap again, they add up.

        out = net(x, t, residuals = scale·controlnet(x, t, hint))

    Args:
        net: (x (B,…), t, residuals=, **cond) -> out. controlnet: (x, t, hint=, **cond) -> residuals; the weight `w` of
            guidance, which a consistency model is told, stays the net's alone, as in diffusers.
        hint: (B,C,H,W), what `ControlNet.look` makes of a picture; one for all if not `guess`.
        scale: one number, or one for each call, in turn; at 0 the ControlNet is not called.
        guess: let the picture lead even without a prompt (section 3.4): of a batch [without, with prompt] as in `cfg`
            only the half with the prompt is controlled; the ControlNet is told guess=True.

    Raises:
        ValueError: scale is no finite number, or there are fewer scales than calls.

    >>> net = lambda x, t, residuals=None: x if residuals is None else x + sum(residuals)
    >>> double = lambda x, t, hint: (2 * hint, x)
    >>> controlled(net, double, torch.tensor([3.0]), 0.5)(torch.ones(1), 0.0)
    tensor([4.5000])
    """
    one = not isinstance(scale, Iterable) or getattr(scale, "ndim", 1) == 0
    scales = repeat(number("scale", scale)) if one else iter(scale)
    last = functools.cache(lambda rows: rows[-len(hint):])               # the same tensor each time, for `kept`

    def steered(x: Tensor, t: float, residuals: tuple[Tensor, ...] | None = None, **cond: Tensor) -> Tensor:
        if (now := next(scales, None)) is None:
            raise ValueError("there are fewer scales than calls of the network: give one for each, or one number")
        if not now:
            return net(x, t, residuals=residuals, **cond)
        told = {name: rows for name, rows in cond.items() if name != "w"}
        if guess and len(x) == 2 * len(hint):
            added = controlnet(x[-len(hint):], t, hint=hint, guess=True, **{k: last(v) for k, v in told.items()})
            added = [torch.cat([torch.zeros_like(part), part]) for part in added]
        else:
            every = hint.repeat(len(x) // len(hint), *[1] * (hint.ndim - 1))
            added = controlnet(x, t, hint=every, **({"guess": True} if guess else {}), **told)
        added = [now * part for part in added]
        return net(x, t, residuals=added if residuals is None else [a + b for a, b in zip(residuals, added)], **cond)

    return steered


def clip(denoise: Callable, low: float = -1.0, high: float = 1.0) -> Callable:
    """Clamp x0 to the data's range and re-derive eps, so that x = alpha·x0 + sigma·eps still holds (Ho et al. 2020).

    NOTE: diffusers' DDIM keeps the old eps unless `use_clipped_model_output`: test_clip_rederives_eps.

    >>> wild = lambda x, level: Pred(3 * x, -x)
    >>> clip(wild)(torch.tensor(1.0), Level(0.0, 0.5, 0.5))
    Pred(x0=tensor(1.), eps=tensor(1.))
    """
    def clipped(x: Tensor, level: Level) -> Pred:
        return _pair(x, denoise(x, level).x0.clamp(low, high), level)

    return clipped


def classifier_guidance(denoise: Callable, log_prob: Callable[[Tensor, Level], Tensor], scale: float) -> Callable:
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2), as a statement about (x0, eps).

        g = ∇_x log p(y|x),   eps −= scale·sigma·g,   x0 += scale·sigma²/alpha·g

    Args:
        log_prob: (x, level) -> (B,) log p(y|x) of a classifier that knows noisy x.

    NOTE: the sigma is often forgotten in print: test_classifier_guidance_needs_sigma.

    Raises:
        ValueError: alpha = 0, where x says nothing about x0.

    >>> flat = lambda x, level: Pred(torch.zeros_like(x), torch.zeros_like(x))
    >>> likes_large = lambda x, level: x.sum(1)                # its gradient is 1 everywhere
    >>> classifier_guidance(flat, likes_large, 2.0)(torch.zeros(1, 1), Level(0.0, 0.6, 0.8)).eps
    tensor([[-1.6000]])
    """
    def guided(x: Tensor, level: Level) -> Pred:
        _, alpha, sigma = level
        if alpha == 0:
            raise ValueError("classifier guidance needs alpha > 0; start from a level above zero terminal SNR")
        x0, eps = denoise(x, level)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(log_prob(leaf, level).sum(), leaf)
        return Pred(x0 + scale * sigma**2 / alpha * g, eps - scale * sigma * g)

    return guided


def interval(guided: Callable, plain: Callable, low: float, high: float) -> Callable:
    """Guidance in an interval of noise levels, none outside (Kynkäänniemi et al. 2024, arXiv 2404.07724).

        guided where low ≤ sigma/alpha ≤ high, plain elsewhere

    Args:
        guided, plain: denoisers (x, level) -> Pred: usually of `cfg`, and of the same net with the condition alone.
        low, high: noise to signal, sigma/alpha; 0 and infinity leave an end open.

    >>> loud, quiet = (lambda x, level: Pred(2 * x, x)), (lambda x, level: Pred(x, x))
    >>> limited = interval(loud, quiet, 0.5, 2.0)
    >>> [limited(torch.tensor(1.0), Level(0.0, *amplitudes)).x0.item() for amplitudes in ((0.6, 0.8), (0.96, 0.28))]
    [2.0, 1.0]
    """
    def limited(x: Tensor, level: Level) -> Pred:
        ratio = level.sigma / level.alpha if level.alpha else math.inf
        return guided(x, level) if low <= ratio <= high else plain(x, level)

    return limited


def inpaint(denoise: Callable, known: Tensor, mask: Tensor, noise: Tensor) -> Callable:
    """Inpainting with any net: outside the mask x is known (Blended Latent Diffusion, arXiv 2206.02779).

        x ← alpha·known + sigma·noise   where mask = 0, from the second call on

    `paste` does the rest, at the end. For one run: it counts its calls. The noise is the same at all levels, as in
    diffusers; in that paper's code and in RePaint (arXiv 2201.09865, eq. 8) it is drawn anew at each.
    Matches: StableDiffusionInpaintPipeline with a 4-channel U-Net (tests/parity/test_pipeline.py).

    Args:
        known: (B,C,h,w) the clean picture or latent. mask: (B,1,h,w), 1 where to paint. noise: (B,C,h,w) unit noise.

    >>> black = lambda x, level: Pred(x, x)
    >>> painted = inpaint(black, torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0]), torch.zeros(2))
    >>> [painted(torch.tensor([1.0, 1.0]), Level(0.0, 0.5, 0.5)).x0 for _ in range(2)]
    [tensor([1., 1.]), tensor([1.5000, 1.0000])]
    """
    begun = False

    def painted(x: Tensor, level: Level) -> Pred:
        nonlocal begun
        if begun:
            x = torch.where(mask > 0, x, level.alpha * known + level.sigma * noise)
        begun = True
        return denoise(x, level)

    return painted


def paste(steps: Iterable[Step], known: Tensor, mask: Tensor) -> Iterator[Step]:
    """The end of `inpaint`: a sampler's steps, the final state being `known` where mask = 0.

    Final is the state that none follows, whatever its level: each step is held back until the next one is taken.

    >>> *_, last = paste([Step(Level(0.0, 1.0, 0.0), torch.ones(2), None)], torch.zeros(2), torch.tensor([0.0, 1.0]))
    >>> last.x
    tensor([0., 1.])
    """
    for step, after in pairwise(chain(steps, [None])):
        yield step if after else step._replace(x=torch.where(mask > 0, step.x, known))


def extended(net: Callable, more: Tensor) -> Callable:
    """A net that is told more channels, in any multiple of their batch: the mask and picture of an inpainting U-Net.

    >>> extended(lambda x, t: x.sum(1), torch.ones(1, 5))(torch.zeros(2, 4), 0.0)
    tensor([5., 5.])
    """
    return lambda x, t, **cond: net(torch.cat([x, more.repeat(len(x) // len(more), *[1] * (x.ndim - 1))], 1), t, **cond)


def _pair(x: Tensor, x0: Tensor, level: Level) -> Pred:
    return Pred(x0, (x - level.alpha * x0) / level.sigma)

"""Guidance: wrappers of nets (classifier-free) and of denoisers (classifier, clipping), which steer what is drawn."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.prediction import Pred
from minidiff.schedule import Level


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


def threshold(denoise: Callable, quantile: float = 0.995, largest: float = 1.0) -> Callable:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): clamp x0 at s, divide by s.

    s is that quantile of |x0|, clamped to [1, largest].

    >>> wild = lambda x, level: Pred(torch.tensor([[4.0, -2.0]]), x)
    >>> threshold(wild, quantile=1.0, largest=8.0)(torch.zeros(1, 2), Level(0.0, 0.6, 0.8)).x0
    tensor([[ 1.0000, -0.5000]])
    """
    def thresholded(x: Tensor, level: Level) -> Pred:
        x0 = denoise(x, level).x0
        s = x0.abs().flatten(1).float().quantile(quantile, dim=1).clamp(1.0, largest).to(x0.dtype)
        s = s.view(-1, *[1] * (x0.ndim - 1))
        return _pair(x, x0.clamp(-s, s) / s, level)

    return thresholded


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


def _pair(x: Tensor, x0: Tensor, level: Level) -> Pred:
    return Pred(x0, (x - level.alpha * x0) / level.sigma)

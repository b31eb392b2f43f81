"""How probable a model finds its data: the probability-flow ODE as a change of variables (arXiv 2011.13456 §4.3)."""
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from minidiff.grid import Grid
from minidiff.schedule import Level


def log_likelihood(denoise: Callable, x: Tensor, grid: Grid, *, probes: Tensor | None = None) -> Tensor:
    """log p(x) of states x at the grid's last level, in nats: Heun's method from there up to the noise.

    In y = x/alpha over u = sigma/alpha the ODE is dy/du = eps, and the density changes by its divergence:

        log p(x) = log N(x_T; 0, alpha_T² + sigma_T²) + ∫ div eps du + D·log(alpha_T/alpha)

    Song et al. 2021 (arXiv 2011.13456, eq. 39). Bits per dimension are −log p/(D·ln 2).

    Args:
        denoise: (x, level) -> Pred, differentiable in x.
        x: (B,...), D numbers per row: data to which the noise of grid[-1] was added.
        grid: from noise, where x is as good as Gaussian of its variance, to a level with sigma > 0.
        probes: (n,B,...) of random signs ±1: the divergence is estimated by their mean (Hutchinson 1989), at one
            backward pass each; None: exactly, with one for each of the D numbers.

    Returns:
        (B,)

    Raises:
        ValueError: a grid that ends at sigma = 0, where the density of data on a surface is infinite, or starts at
            alpha = 0.

    Matches: the exact density of a mixture, tests/test_likelihood.py.

    >>> from minidiff import exact; from minidiff.data.toys import Mixture; from minidiff.sd.scheduler import preset
    >>> line, grid = Mixture(torch.ones(1), torch.zeros(1, 1), 1.0), preset("sd-ddim", 200)
    >>> log_likelihood(exact.denoiser(line), torch.zeros(1, 1), grid).exp()       # N(0, 1) at 0: 1/√(2π)
    tensor([0.3990])
    """
    if grid[-1].sigma == 0 or grid[0].alpha == 0:
        raise ValueError("the likelihood is that of slightly noisy data, from a level with alpha > 0 on: give a grid "
                         "whose last level has sigma > 0 and whose first has alpha > 0, such as preset('sd-ddim', n)")
    dims = x[0].numel()

    def slope(y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """dy/du, and its divergence (B,)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = y.clone().requires_grad_()
            eps = denoise(level.alpha * leaf, level).eps
            signs = torch.eye(dims).to(y).view(dims, 1, *y.shape[1:]) if probes is None else probes.to(y)
            rows = (torch.autograd.grad(eps, leaf, sign.expand_as(eps), retain_graph=True)[0] for sign in signs)
            parts = torch.stack([(row * sign).flatten(1).sum(1) for row, sign in zip(rows, signs)])  # (n, B)
        return eps.detach(), parts.sum(0) if probes is None else parts.mean(0)

    y, change = x / grid[-1].alpha, 0.0
    for now, nxt in pairwise(reversed(grid)):
        (_, a, s), (_, a1, s1) = now, nxt
        du = s1 / a1 - s / a
        eps, div = slope(y, now)
        eps1, div1 = slope(y + du * eps, nxt)
        y, change = y + du / 2 * (eps + eps1), change + du / 2 * (div + div1)
    _, alpha, sigma = grid[0]
    var = alpha**2 + sigma**2
    prior = -0.5 * (dims * math.log(math.tau * var) + (alpha * y).flatten(1).square().sum(1) / var)
    return prior + change + dims * math.log(alpha / grid[-1].alpha)

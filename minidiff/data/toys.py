"""Two-dimensional data sets, small enough to see every point, and Gaussian mixtures, whose exact answers are known."""
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

NAMES = ("moons", "circles", "spiral", "swiss_roll", "checkerboard", "pinwheel", "ring", "grid")


class Mixture(NamedTuple):
    """p(x) = Σ_k weights[k] · N(x; means[k], std²·I), the density with a closed-form score at every noise level.

    Noised by x = alpha·x0 + sigma·eps it stays a mixture: means alpha·means[k], variance alpha²·std² + sigma². What
    follows from that exactly is in `minidiff.exact`.

    Args:
        weights: (K,), positive, sum 1. means: (K, D).
        std: of every component, in every direction, or (K,) of each; 0 where a component is a point.
    """

    weights: Tensor
    means: Tensor
    std: float | Tensor


def mixture(name: str) -> Mixture:
    """The parameters behind `sample("ring", …)` (8 blobs on a circle) or `sample("grid", …)` (9 blobs, 3×3).

    Both have mean 0 and, with K blobs of weight 1/K, mean square ½·Σ_k |m_k|²/K + std² = 1 per coordinate.

    Returns:
        K equal weights (K,), means (K, 2), one std.

    Raises:
        ValueError: another name.

    >>> blobs = mixture("ring"); len(blobs.means), round(blobs.std, 3)
    (8, 0.14)
    """
    if name == "ring":
        angle = torch.arange(8) * math.tau / 8
        means = torch.stack([angle.cos(), angle.sin()], 1)
    elif name == "grid":
        means = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
    else:
        raise ValueError(f"there is no mixture called {name!r}; there are 'ring' and 'grid'")
    std = 0.1
    scale = math.sqrt(0.5 * means.square().sum(1).mean().item() + std * std)
    return Mixture(torch.full((len(means),), 1 / len(means)), means / scale, std / scale)


def sample(name: str, n: int, *, seed: int = 0) -> Tensor:
    """n independent points of a toy distribution with mean 0 and, over both coordinates (one scale), mean square 1.

    Args:
        name: one of `NAMES`.
        n: how many, at least 1.
        seed: the same name, n and seed give the same points.

    Returns:
        (n, 2) float32.

    Raises:
        ValueError: unknown name, or n < 1.

    >>> points = sample("moons", 1000); points.shape, round(points.square().mean().item(), 1)
    (torch.Size([1000, 2]), 1.0)
    """
    if name not in NAMES:
        raise ValueError(f"there is no toy called {name!r}; there are {', '.join(NAMES)}")
    if n < 1:
        raise ValueError(f"n is {n}; draw at least 1 point")
    g = Generator().manual_seed(seed)
    if name in ("ring", "grid"):
        weights, means, std = mixture(name)
        return means[torch.randint(len(weights), (n,), generator=g)] + std * torch.randn(n, 2, generator=g)
    middle, scale = _frame(name)
    return (_raw(name, n, g) - middle) / scale


@lru_cache
def _frame(name: str) -> tuple[Tensor, Tensor]:
    """Mean and scale of the distribution itself, from 2¹⁷ points, so that small samples are not bent to fit exactly."""
    points = _raw(name, 1 << 17, Generator().manual_seed(0))
    middle = points.mean(0)
    return middle, (points - middle).square().mean().sqrt()


def _raw(name: str, n: int, g: Generator) -> Tensor:
    u, v = torch.rand(2, n, generator=g)
    noise = torch.randn(n, 2, generator=g)
    part = torch.randint(2, (n,), generator=g)
    if name == "moons":  # two half circles, one upside down in the other's mouth
        a = math.pi * u
        x, y = a.cos(), a.sin()
        return torch.stack([torch.where(part == 1, 1 - x, x), torch.where(part == 1, 0.5 - y, y)], 1) + 0.06 * noise
    if name == "circles":
        return (1 - 0.5 * part[:, None]) * _polar(1, math.tau * u) + 0.04 * noise
    if name == "spiral":  # two arms; angle ∝ √u spreads the points evenly along them
        turn = 3 * math.pi * u.sqrt()
        return _polar(turn, turn + math.pi * part) + 0.25 * noise
    if name == "swiss_roll":
        turn = math.pi * (1.5 + 3 * u)
        return _polar(turn, turn) + 0.35 * noise
    if name == "checkerboard":  # the 8 black fields of 4×4, side 1
        column, row = (4 * u).floor(), 2 * (2 * v).floor()
        return torch.stack([4 * u, row + column % 2 + (2 * v) % 1], 1)
    blade = torch.randint(5, (n,), generator=g)  # pinwheel: 5 blobs, each sheared by its distance from the middle
    r, across = 1 + 0.3 * noise[:, 0], 0.07 * noise[:, 1]
    turn = blade * math.tau / 5 + 0.6 * r.exp()
    return _polar(r, turn) + _polar(across, turn + math.pi / 2)


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)  # (n, 2)

"""At which times to train: densities for flow matching, and pairs of neighbours for consistency models."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1), most of them in the middle: sigmoid(mean + std·z) (SD 3, arXiv 2403.03206, eq. 19).

    Args:
        z: unit noise. T times the result is what `schedule.Flow` takes.

    >>> logit_normal(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.1192, 0.5000, 0.8808])
    """
    return torch.sigmoid(mean + std * z)


def mode(u: Tensor, s: float = 1.29) -> Tensor:
    """Times in [0, 1], most of them in the middle: 1 − u − s·(cos²(πu/2) − 1 + u) (SD 3, arXiv 2403.03206, eq. 20).

    Args:
        u: uniform in [0, 1]. s: in [−1, 2/(π − 2)]; 0: uniform, below: more at the ends.

    >>> mode(torch.tensor([0.0, 0.5, 1.0])), mode(torch.tensor([0.25]), 0.0)
    (tensor([1.0000, 0.5000, 0.0000]), tensor([0.7500]))
    """
    return 1 - u - s * ((math.pi / 2 * u).cos().square() - 1 + u)


def cosmap(u: Tensor) -> Tensor:
    """Times with the log-SNR of the cosine schedule: 1 − 1/(tan(πu/2) + 1) (SD 3, arXiv 2403.03206, eq. 21).

    Their density is 2/(π − 2πt + 2πt²).

    Args:
        u: uniform in [0, 1).

    >>> cosmap(torch.tensor([0.0, 0.5, 0.75]))
    tensor([0.0000, 0.5000, 0.7071])
    """
    return 1 - 1 / ((math.pi / 2 * u).tan() + 1)


def ct_levels(step: int, steps: int, first: int = 2, last: int = 200) -> int:
    """How many levels consistency training has at a step: few at first, then more (arXiv 2303.01469, appendix C).

        N = ⌈√(step/steps·((last + 1)² − first²) + first²) − 1⌉ + 1

    >>> [ct_levels(step, 800_000) for step in (0, 100, 1_000, 10_000, 100_000, 800_000)]
    [2, 4, 8, 23, 72, 201]
    """
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def ct_decay(levels: int, first: int = 2, begin: float = 0.95) -> float:
    """That of the average which is the goal then: begin^(first/N), nearer to 1 with more levels (arXiv 2303.01469).

    >>> [round(ct_decay(levels), 5) for levels in (2, 23, 201)]
    [0.95, 0.99555, 0.99949]
    """
    return math.exp(first * math.log(begin) / levels)


def ict_levels(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """How many levels improved consistency training has: doubled in equal intervals (arXiv 2310.14189, eq. 8).

        N = min(first·2^⌊step/K⌋, last) + 1,   K = ⌊steps/(log2⌊last/first⌋ + 1)⌋

    >>> [ict_levels(step, 400_000) for step in (0, 50_000, 100_000, 399_999)]
    [11, 21, 41, 1281]
    """
    every = max(1, int(steps / (math.log2(last // first) + 1)))
    return min(first * 2 ** (step // every), last) + 1


def ict_shares(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """How often each pair of neighbours is drawn: as a normal ln(sigma) falls between them (2310.14189, eq. 10).

    Args:
        levels: (N,) sigmas in rising order.

    Returns:
        (N − 1,), which add up to 1.

    >>> ict_shares(torch.tensor([0.01, 0.3329, 10.0]))
    tensor([0.5025, 0.4975])
    """
    shares = torch.erf((levels.log() - mean) / (math.sqrt(2) * std)).diff()
    return shares / shares.sum()


def ect_next(u: Tensor, stage: float, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The neighbour of a level in easy consistency tuning: u·(1 − n(u)/q^stage), at least 0 (arXiv 2406.14548, eq. 13).

        n(u) = 1 + k·sigmoid(−b·u)

    It starts from a diffusion model. At stage 1 nearly all neighbours are the data; each stage halves the distance.

    Args:
        u: sigmas. stage: 1, 2, …

    >>> ect_next(torch.tensor([0.1, 1.0, 10.0]), 1), ect_next(torch.tensor([10.0]), 8)
    (tensor([0.0000, 0.0000, 4.9982]), tensor([9.9609]))
    """
    return (u * (1 - (1 + k * torch.sigmoid(-b * u)) / q**stage)).clamp(min=0)

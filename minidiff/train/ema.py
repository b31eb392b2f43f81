"""Exponential moving average of the weights (Polyak averaging; Ho et al. 2020, arXiv 2006.11239, appendix B)."""
from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn


def constant(decay: float) -> Callable[[int], float]:
    """n -> d, always the same: looks back over 1/(1 − d) steps, and keeps d^n of the random start after n of them.

    Raises:
        ValueError: decay is not in [0, 1).

    >>> constant(0.999)(0)
    0.999
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"EMA decay is {decay}; it must lie in [0, 1)")
    return lambda n: decay


def warmed(decay: float) -> Callable[[int], float]:
    """n -> min(decay, (1 + n)/(10 + n)): at first it looks back over about n/9 steps, and so forgets the random start.

    >>> [round(warmed(0.999)(n), 4) for n in (0, 90, 10**6)]
    [0.1, 0.91, 0.999]
    """
    final = constant(decay)
    return lambda n: min(final(n), (1 + n) / (10 + n))


def power(width: float) -> Callable[[int], float]:
    """n -> (1 − 1/(n + 1))^(gamma + 1): the power-function average (Karras et al. 2024, arXiv 2312.02696, section 3.1).

    After N updates the net of update i weighs (i/N)^(gamma+1) − ((i−1)/N)^(gamma+1): a profile i^gamma that grows with
    the run, and holds nothing of the random start.

    Args:
        width: standard deviation of the profile as a share of the run, in (0, 0.28]; it fixes gamma (algorithm 2).

    Raises:
        ValueError: another width.

    >>> [round(power(0.1)(n), 4) for n in (0, 1, 99, 999)]
    [0.0, 0.0041, 0.9233, 0.9921]
    """
    if not 0.0 < width <= 0.28:
        raise ValueError(f"EMA width is {width}; it must lie in (0, 0.28]")
    gamma = float(max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real))  # width² = (γ + 1)/((γ + 2)²·(γ + 3))
    return lambda n: (1 - 1 / (n + 1)) ** (gamma + 1)


class EMA:
    """The average net that is shipped: w̄ ← d·w̄ + (1 − d)·w after every step.

    Args:
        net: the module to follow; it is copied once, gradients off.
        decay: the number of updates so far -> d in [0, 1): `constant`, `warmed`, `power` or your own. A number means
            `warmed`.

    >>> net = nn.Linear(1, 1, bias=False); ema = EMA(net, decay=0.0)
    >>> _ = nn.init.constant_(net.weight, 3.0); ema.update(net); ema.net.weight.item()
    3.0
    """

    def __init__(self, net: nn.Module, decay: float | Callable[[int], float]):
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay if callable(decay) else warmed(decay)
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards `net`."""
        d = self.decay(self.updates)
        self.updates += 1
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1.0 - d)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)

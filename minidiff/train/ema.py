"""Exponential moving average of the weights (Polyak averaging; Ho et al. 2020, arXiv 2006.11239, appendix B)."""
from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """The average net that is shipped: w̄ ← d·w̄ + (1 − d)·w after every step, with d = min(decay, (1 + n)/(10 + n)).

    The rising d lets the average forget the random start: after n updates it looks back over about n/9 steps.

    Args:
        net: the module to follow; it is copied once, gradients off.
        decay: the final d, in [0, 1); 0.999 looks back over 1,000 steps.

    >>> net = nn.Linear(1, 1, bias=False); ema = EMA(net, decay=0.0)
    >>> _ = nn.init.constant_(net.weight, 3.0); ema.update(net); ema.net.weight.item()
    3.0
    """

    def __init__(self, net: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay is {decay}; it must lie in [0, 1)")
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards `net`."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1.0 - d)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)

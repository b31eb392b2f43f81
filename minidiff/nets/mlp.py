"""A small network for points in the plane: what the U-Net is for pictures."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidiff.nets.config import Config
from minidiff.nets.layers import Embedding, Net, silu, sinusoid


@dataclass(frozen=True)
class MLPConfig(Config):
    """dim: numbers per point. ch: width, even. layers: residual layers."""

    dim: int = 2
    ch: int = 128
    layers: int = 3


class MLP(Net):
    """Residual layers that are each told the time, x ← x + W·silu(x + emb(t)).

    >>> MLP(MLPConfig(ch=8))(torch.zeros(5, 2), 500).shape
    torch.Size([5, 2])
    """

    Config = MLPConfig

    def __init__(self, config: MLPConfig = MLPConfig()):
        super().__init__(config)
        ch = config.ch
        self.time_embedding = Embedding(ch, ch)
        self.linear_in = nn.Linear(config.dim, ch)
        self.layers = nn.ModuleList(nn.Linear(ch, ch) for _ in range(config.layers))
        self.linear_out = nn.Linear(ch, config.dim)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """x (B,dim), t (B,) or one number in 0 … T−1 -> raw prediction (B,dim)."""
        emb = self.time_embedding(sinusoid(torch.as_tensor(t, device=x.device).reshape(-1), self.config.ch).to(x))
        x = self.linear_in(x)
        for layer in self.layers:
            x = x + layer(silu(x + emb))
        return self.linear_out(silu(x))

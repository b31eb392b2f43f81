"""LoRA to train (Hu et al. 2021, arXiv 2106.09685): beside a frozen layer two small ones, which learn its change.

Files, kinds that are only read, and merging into the weights: `minidiff.io.lora`.
"""
from __future__ import annotations

import math
import re

from torch import Tensor, nn

from minidiff.io.lycoris import Change


class LoRA(nn.Module):
    """A frozen linear layer or convolution, and a change of low rank that learns.

        y = layer(x) + (alpha/rank)·up(down(dropout(x))),   up = 0 at first, so that nothing changes

    Args:
        layer: nn.Linear or nn.Conv2d (of one group); it is frozen. `down` has its kernel, `up` is 1×1.
        rank: at least 1. alpha: None: the rank, factor 1.
        dropout: share of the inputs of `down` that are left out in training, in [0, 1).

    Raises:
        ValueError: a layer of another kind, or a number out of its range.

    Matches: peft's LoraLayer, values and gradients, tests/parity/test_lora.py.

    >>> import torch
    >>> layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    >>> lora = LoRA(layer, rank=1)
    >>> torch.equal(lora(x), layer(x)), [name for name, p in lora.named_parameters() if p.requires_grad]
    (True, ['down.weight', 'up.weight'])
    """

    def __init__(self, layer: nn.Module, rank: int = 4, alpha: float | None = None, dropout: float = 0.0):
        super().__init__()
        if rank < 1 or alpha is not None and not math.isfinite(alpha) or not 0 <= dropout < 1:
            raise ValueError(f"rank {rank}, alpha {alpha}, dropout {dropout}: a LoRA has a rank of at least 1, a "
                             "finite alpha and a dropout in [0, 1)")
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            kind = type(layer)                                             # Pointwise reads tokens, not maps
            self.down = kind(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                             bias=False)
            self.up = kind(rank, layer.out_channels, 1, bias=False)
        elif isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features,
                                                                                           bias=False)
        else:
            raise ValueError(f"a LoRA changes linear layers and convolutions of one group, not {layer}")
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight)
        self.layer, self.dropout = layer.requires_grad_(False), nn.Dropout(dropout)
        self.factor = 1.0 if alpha is None else alpha / rank

    @property
    def weight(self) -> Tensor:
        """The frozen layer's."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes, and what it gives, changed."""
        return self.layer(x) + self.factor * self.up(self.down(self.dropout(x)))

    def change(self) -> Change:
        """What it has learned, for `Loras.add` and files."""
        return Change(self.down.weight.detach().clone(), self.up.weight.detach().clone(), self.factor)


def adapt(net: nn.Module, pattern: str = r".*\.to_(q|k|v|out\.0)", *, rank: int = 4, alpha: float | None = None,
          dropout: float = 0.0) -> dict[str, LoRA]:
    """Freeze a network, and put a LoRA round every layer whose whole name matches; it is changed in place.

    Args:
        pattern: a regular expression; the default are the four projections of every attention, as in diffusers'
            scripts. ".*" takes all linear layers and convolutions.

    Returns:
        {name of the layer: its LoRA}: `restore` takes them out again.

    Raises:
        ValueError: nothing matches, or as `LoRA`.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Linear(3, 1))
    >>> sorted(adapt(net, "2", rank=1)), [p.requires_grad for p in net.parameters()]
    (['2'], [False, False, True, True, False, False])
    """
    found = {name: layer for name, layer in net.named_modules()
             if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name)}
    if not found:
        raise ValueError(f"no linear layer or convolution has a name that matches {pattern!r}")
    net.requires_grad_(False)
    loras = {name: LoRA(layer, rank, alpha, dropout) for name, layer in found.items()}
    for name, lora in loras.items():
        _put(net, name, lora)
    return loras


def restore(net: nn.Module, loras: dict[str, LoRA]) -> None:
    """Take LoRAs out of a network: its layers are as they were, frozen.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> restore(net, adapt(net, ".*")); net
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    for name, lora in loras.items():
        _put(net, name, lora.layer)


def _put(net: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, layer)

"""Three trained models that draw badly, each for one reason, for the last exercise of notebook 08."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from minidiff.grid import Grid


class Case(NamedTuple):
    """What one needs to examine a run.

    Args:
        net, raw: the averaged net, which draws, and the net as the last step left it.
        data: (N,C,H,W), what it was trained on. grid: the levels it draws along.
    """

    net: nn.Module
    raw: nn.Module
    data: Tensor
    grid: Grid


def patients(healthy: Case, late: nn.Module, fit: Callable[[Tensor], tuple[nn.Module, nn.Module]]) -> dict[str, Case]:
    """The cases A, B and C. Do not read on before you have examined them.

    Args:
        healthy: a run that draws well. late: an average of it that still holds much of the random start.
        fit: data -> (averaged, raw), trained on from the healthy net.

    >>> import torch; from minidiff.grid import Level
    >>> grid = Grid([Level(0.9, 1.0, 40.0), Level(0.1, 1.0, 1.4), Level(0.0, 1.0, 0.0)])
    >>> case = Case(nn.Identity(), nn.Identity(), torch.zeros(1, 3, 2, 2), grid)
    >>> sorted(patients(case, nn.Identity(), lambda data: (nn.Identity(), nn.Identity())))
    ['A', 'B', 'C']
    """
    low = [level for level in healthy.grid if level.sigma < 1.5]
    data = healthy.data / 2 + 0.5
    net, raw = fit(data)
    return {"A": healthy._replace(grid=Grid(low, True)), "B": healthy._replace(net=late),
            "C": healthy._replace(net=net, raw=raw, data=data)}

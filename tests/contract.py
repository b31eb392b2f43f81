"""What proves a notebook's own definition equal to the package's: inputs for each name that a cell is tagged with."""
import math

import torch

Rows = tuple[tuple, ...]  # the arguments of one call each

CASES: dict[str, Rows] = {
    "schedule.linear_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.scaled_linear_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.cosine_betas": ((), (10,), (50, 0.02, 0.9)),
    "schedule.sigmoid_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.amplitudes": ((0.75,), (0.0,), (14.6,), (math.inf,)),
}


def prove(scratch, package, rows: Rows) -> None:
    """The same values for every row, and the same gradients with respect to its floating-point tensors."""
    for row in rows:
        given = [[a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in row]
                 for _ in range(2)]
        mine, theirs = scratch(*given[0]), package(*given[1])
        torch.testing.assert_close(mine, theirs)
        leaves = [[a for a in side if torch.is_tensor(a) and a.requires_grad] for side in given]
        if leaves[0]:
            gradients = [torch.autograd.grad(total(out), side) for out, side in zip((mine, theirs), leaves)]
            torch.testing.assert_close(*gradients)


def total(out) -> torch.Tensor:
    """One number in which every entry of an answer counts differently."""
    parts = [part for part in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(part)]
    return sum((part * torch.linspace(1, 2, part.numel()).view(part.shape).to(part)).sum() for part in parts)

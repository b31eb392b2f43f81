"""Float32 judged by float64: in deep networks rounding errors grow, on each processor in its own way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same(pairs: Callable[[torch.dtype], Sequence[tuple[Tensor, Tensor]]]) -> None:
    """pairs(dtype) computes (ours, the reference's) in dtype. In float64 the two are equal. In float32 the root mean
    square of our error is at most twice the reference's and a few roundings of the largest value; the worst single
    error is chance: by how much it is whose does not follow from the arithmetic."""
    for (ours, theirs), (mine, truth) in zip(pairs(torch.float32), pairs(torch.float64), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and mine.dtype == truth.dtype == torch.float64
        assert ours.shape == theirs.shape == mine.shape == truth.shape
        size = truth.abs().max()
        assert (mine - truth).abs().max() <= 1e-10 * size
        error, allowed = ((x - truth).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * size

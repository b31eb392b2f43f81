"""Float32 judged by float64: in deep networks rounding errors grow, on each processor in its own way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same(pairs: Callable[[torch.dtype], Sequence[tuple[Tensor, Tensor]]]) -> None:
    """pairs(dtype) computes (ours, the reference's) in dtype. In float64 the two are equal. In float32 the root mean
    square of our error is at most twice the reference's and a few roundings of the largest value; the worst single
    error is chance: whose is larger, and by how much, does not follow from the arithmetic."""
    for (ours, theirs), (mine, truth) in zip(pairs(torch.float32), pairs(torch.float64), strict=True):
        size = truth.abs().max().item()
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-10 * size)
        error, reference = ((x - truth).square().mean().sqrt().item() for x in (ours, theirs))
        allowed = 2 * reference + 8 * torch.finfo(torch.float32).eps * size
        assert error <= allowed, f"in float32 we err by {error:.1e}, the reference by {reference:.1e}"

"""Denoisers that are exactly right: of a mixture of Gaussians, or of a finite set of points, Gaussians of width 0."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.data.toys import Mixture
from minidiff.prediction import Pred
from minidiff.schedule import Level


def points(x0: Tensor) -> Mixture:
    """The distribution of a finite data set, each of its N points with probability 1/N: its denoiser is the ideal one.

    A network that is trained on these points for long enough, and is large enough, ends there (arXiv 2206.00364,
    appendix B.3): it can only reproduce them.

    Args:
        x0: (N,...), points or pictures.

    >>> denoise = denoiser(points(torch.tensor([[-1.0], [1.0]])))
    >>> denoise(torch.tensor([[0.0], [0.5]]), Level(0.0, 0.8, 0.6)).x0
    tensor([[0.0000],
            [0.8045]])
    """
    return Mixture(torch.full((len(x0),), 1 / len(x0)), x0.flatten(1), 0.0)


def log_joint(mixture: Mixture, x: Tensor, level: Level) -> Tensor:
    """log p(k, x) of each component k and each state x, (B,K): noise turns N(m, s²) into N(alpha·m, alpha²s² + sigma²).

    Its log_softmax over k is log p(k | x), the exact classifier.

    Args:
        x: (B,...), as many numbers per row as the means have. level: sigma > 0, or a mixture of std > 0.

    >>> log_joint(Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 1.0), torch.zeros(1, 1),
    ...           Level(0.0, 1.0, 0.0)).softmax(1)
    tensor([[0.5000, 0.5000]])
    """
    x, (logs, means, _, var) = x.flatten(1), _noised(mixture, x, level)
    # cdist by differences: its other way, by products, loses digits where sigma is small
    far = torch.cdist(x, level.alpha * means, compute_mode="donot_use_mm_for_euclid_dist").square()
    return logs - 0.5 * (x.shape[1] * (math.tau * var).log() + far / var)


def log_density(mixture: Mixture, x: Tensor, level: Level) -> Tensor:
    """log p(x) of noisy data, (B,), in nats; its gradient is the score, −eps/sigma of the exact denoiser.

    >>> line = Mixture(torch.ones(1), torch.zeros(1, 1), 1.0)
    >>> log_density(line, torch.zeros(1, 1), Level(0.0, 0.8, 0.6)).exp()      # N(0, 1) at 0: 1/√(2π)
    tensor([0.3989])
    """
    return log_joint(mixture, x, level).logsumexp(1)


def denoiser(mixture: Mixture) -> Callable[[Tensor, Level], Pred]:
    """E[x0 | x] and E[eps | x]: what no network can beat in mean square.

        E[x0 | x] = Σ_k p(k|x)·(m_k + alpha·s_k²/v_k·(x − alpha·m_k)),   v_k = alpha²·s_k² + sigma²

    Matches: quadrature, and autograd of `log_density` by Tweedie's formula, tests/test_exact.py.

    >>> line = Mixture(torch.ones(1), torch.zeros(1, 1), 1.0)
    >>> denoiser(line)(torch.tensor([[2.0]]), Level(0.0, 0.8, 0.6))
    Pred(x0=tensor([[1.6000]]), eps=tensor([[1.2000]]))
    """
    def denoise(x: Tensor, level: Level) -> Pred:
        _, alpha, sigma = level
        flat, (_, means, std, var) = x.flatten(1), _noised(mixture, x, level)
        share = log_joint(mixture, x, level).softmax(1) / var                               # (B, K): p(k|x)/v_k
        x0 = sigma**2 * share @ means + alpha * (share @ std.square())[:, None] * flat
        eps = sigma * (share.sum(1, keepdim=True) * flat - alpha * share @ means)
        return Pred(x0.view(x.shape), eps.view(x.shape))

    return denoise


def consistency(mixture: Mixture, least: float, steps: int = 1000) -> Callable[[Tensor, Level], Pred]:
    """The consistency function of a mixture: the point at u = least to which the probability-flow ODE leads from x.

        dy/du = E[eps | y],   y = x/alpha,   u = sigma/alpha;   of one Gaussian N(m, s²)
        y(least) = m + (y − m)·√((s² + least²)/(s² + u²))

    Runge and Kutta's fourth-order steps, equal ones in asinh(u/w), w the smallest width or `least`; in float64 within
    1e-8 of the truth.

    Args:
        least: the noise-to-signal ratio at which paths end; above 0 for a mixture of width 0. steps: on every path.

    Returns:
        (x, level) -> Pred: x0 is the end, eps what is then left of x, as from `prediction.consistent`.

    Raises:
        ValueError: least is below 0, or 0 where the mixture has points.

    Matches: the formula above, and twice as many steps, tests/test_exact.py.

    >>> line = Mixture(torch.ones(1), torch.zeros(1, 1), 1.0)
    >>> consistency(line, 0.0)(torch.tensor([[2.0]], dtype=torch.float64), Level(0.0, 1.0, 3.0)).x0
    tensor([[0.6325]], dtype=torch.float64)
    """
    width = max(torch.as_tensor(mixture.std).min().item(), least)
    if not least >= 0 or not width:
        raise ValueError(f"least is {least}; it must be at least 0, and above it for a mixture of points")
    denoise = denoiser(mixture)

    def end(x: Tensor, level: Level) -> Pred:
        _, alpha, sigma = level
        y, at = x / alpha, math.asinh(sigma / alpha / width)
        h = (math.asinh(least / width) - at) / steps

        def slope(y: Tensor, at: float) -> Tensor:
            return width * math.cosh(at) * denoise(y, Level(0.0, 1.0, width * math.sinh(at))).eps

        for i in range(steps):
            a, middle = at + i * h, at + (i + 0.5) * h
            k1 = slope(y, a)
            k2 = slope(y + h / 2 * k1, middle)
            k3 = slope(y + h / 2 * k2, middle)
            # the last slope of a path that ends at 0, where eps is none: that of a hair above
            k4 = slope(y + h * k3, max(at + (i + 1) * h, 1e-9))
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return Pred(y, (x - alpha * y) / sigma)

    return end


def _noised(mixture: Mixture, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log weights (K,), means (K,D) and stds (K,) of the clean mixture, and the variance (K,) at this level, as x."""
    weights, means = mixture.weights.to(x), mixture.means.to(x)
    std = torch.as_tensor(mixture.std, dtype=x.dtype, device=x.device).expand(len(means))
    return weights.log(), means, std, level.alpha**2 * std.square() + level.sigma**2

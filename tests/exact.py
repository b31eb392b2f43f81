"""Exact denoisers: x = alpha·x0 + sigma·eps in float64, for data from a mixture of Gaussians on the line."""

from dataclasses import dataclass

import torch

from minidiff.prediction import Pred
from minidiff.schedule import Level


@dataclass(frozen=True)
class Mixture:
    """Data Σ_k weight_k·N(mean_k, std_k²), each entry of x by itself; one component is a Gaussian."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _parts(self, x, level):
        """Of each component k, last axis: residual x − alpha·mean, variance of x, log p(k, x) + const."""
        _, alpha, sigma = level
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        residual, var = x[..., None] - alpha * means, alpha**2 * stds**2 + sigma**2
        return residual, var, weights.log() - var.log() / 2 - residual**2 / (2 * var)

    def log_posterior(self, k, x, level):
        """log p(component k | x)."""
        return self._parts(x, level)[2].log_softmax(-1)[..., k]

    def denoise(self, x, level):
        """E[x0 | x] and E[eps | x]."""
        residual, var, log = self._parts(x, level)
        given, means, stds = log.softmax(-1), torch.tensor(self.means), torch.tensor(self.stds)  # exact in float32
        x0 = means + level.alpha * stds**2 / var * residual
        return Pred((given * x0).sum(-1), (given * level.sigma / var * residual).sum(-1))

    def cdf(self, x, level):
        residual, var, _ = self._parts(x, level)
        return (torch.tensor(self.weights) * torch.special.ndtr(residual / var.sqrt())).sum(-1)

    def transport(self, x, start, end):
        """Where the probability-flow ODE takes x: on the line it keeps the quantile (found by bisection)."""
        p, low, high = self.cdf(x, start), torch.full_like(x, -50), torch.full_like(x, 50)
        for _ in range(80):
            mid = (low + high) / 2
            below = self.cdf(mid, end) < p
            low, high = torch.where(below, mid, low), torch.where(below, high, mid)
        return (low + high) / 2


GAUSSIAN = Mixture((1.0,), (0.5,), (0.5,))
TWO = Mixture((0.25, 0.75), (-1.0, 1.5), (0.5, 0.25))  # all exact in binary, so in float32 too
PLACES = {"VP": lambda u: (1 / (1 + u * u) ** 0.5, u / (1 + u * u) ** 0.5), "VE": lambda u: (1.0, u),
          "flow": lambda u: (1 / (1 + u), u / (1 + u))}


def moved(level: Level, coordinates: str) -> Level:
    """The level of the same sigma/alpha in other coordinates."""
    return Level(level.t, *PLACES[coordinates](level.sigma / level.alpha))

"""Noise schedules: how much picture (alpha) and how much noise (sigma) is in x = alpha·x0 + sigma·eps at time t."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """One noise level, in Python floats: the time t that the net is fed, and the amplitudes alpha and sigma."""

    t: float
    alpha: float
    sigma: float


def linear_betas(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """beta from `start` to `end` in equal steps, (T,) float32 (DDPM, arXiv 2006.11239, section 4).

    >>> linear_betas(3, 0.1, 0.3)
    tensor([0.1000, 0.2000, 0.3000])
    """
    return torch.linspace(start, end, T)


def scaled_linear_betas(T: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """√beta in equal steps, (T,) float32; the defaults are Stable Diffusion's (CompVis v1-inference.yaml).

    >>> scaled_linear_betas()[[0, 1, 999]]
    tensor([0.0008, 0.0009, 0.0120])
    """
    return torch.linspace(start**0.5, end**0.5, T) ** 2


def cosine_betas(T: int = 1000, s: float = 0.008, cap: float = 0.999) -> Tensor:
    """beta_i = min(1 − f((i+1)/T)/f(i/T), cap), f(u) = cos²((u + s)/(1 + s)·π/2), (T,) (arXiv 2102.09672, eq. 17).

    >>> alpha_bar = (1 - cosine_betas()).cumprod(0); round(alpha_bar[499].item(), 3)   # about half-way
    0.494
    """
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=cap).float()


def sigmoid_betas(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """start + (end − start)·sigmoid(u), u from −6 to 6, (T,) (GeoDiff, arXiv 2203.02923; diffusers' "sigmoid").

    >>> sigmoid_betas()[[0, 999]]
    tensor([0.0001, 0.0200])
    """
    return torch.sigmoid(torch.linspace(-6, 6, T)) * (end - start) + start


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale √alpha_bar so that the last one is 0 and the first stays (arXiv 2305.08891, algorithm 1).

    >>> zero_terminal_snr(torch.tensor([0.81, 0.25]))
    tensor([0.8100, 0.0000])
    """
    alpha = alpha_bar.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def interpolate(t: float, table: Sequence[float]) -> float:
    """The entry of a table at a fractional position, linearly.

    >>> interpolate(1.25, [0.0, 10.0, 20.0])
    12.5
    """
    low = int(t)
    return table[low] if t == low else table[low] + (t - low) * (table[low + 1] - table[low])


def amplitudes(nsr: float) -> tuple[float, float]:
    """(alpha, sigma) of a noise-to-signal ratio sigma/alpha, variance-preserving: alpha² + sigma² = 1.

    >>> amplitudes(0.75), amplitudes(math.inf)
    ((0.8, 0.6), (0.0, 1.0))
    """
    return (0.0, 1.0) if math.isinf(nsr) else (1 / math.hypot(1, nsr), nsr / math.hypot(1, nsr))


@dataclass(frozen=True, eq=False)
class Discrete:
    """A table of T noise levels, variance-preserving: alpha = √alpha_bar[t], sigma = √(1 − alpha_bar[t]).

    Args:
        alpha_bar: (T,) float32, falling, in [0, 1): alpha_bar[t] = Π (1 − beta[0…t]) (DDPM, eq. 4). Index t is the
            state after t + 1 steps: index 0 has one step of noise in it, and clean data have no entry.

    Raises:
        ValueError: alpha_bar does not fall, or leaves [0, 1).

    >>> alpha, sigma = SD(500)
    >>> round(alpha, 4), round(sigma, 4), round(sigma / alpha, 4)
    (0.5257, 0.8507, 1.6183)
    >>> SD(torch.tensor([0, 999]))[0]
    tensor([0.9996, 0.0683])
    """

    alpha_bar: Tensor

    def __post_init__(self):
        steps = self.alpha_bar
        if steps.ndim != 1 or not (0 <= steps[-1] and steps[0] < 1 and (steps.diff() < 0).all()):
            raise ValueError("alpha_bar must be one row of falling numbers in [0, 1)")

    @classmethod
    def from_betas(cls, betas: Tensor) -> Discrete:
        """The table of alpha_bar[t] = Π (1 − beta[0…t])."""
        return cls(torch.cumprod(1 - betas, 0))

    @property
    def T(self) -> int:
        """Number of training times; t runs from 0 (nearly clean) to T − 1."""
        return len(self.alpha_bar)

    @cached_property
    def nsr(self) -> list[float]:
        """sigma/alpha of every t, in float64 (infinite where alpha is 0)."""
        alpha_bar = self.alpha_bar.double()
        return ((1 - alpha_bar) / alpha_bar).sqrt().tolist()

    def __call__(self, t: float | Tensor) -> tuple:
        """(alpha, sigma) of time t.

        Args:
            t: a number in [0, T − 1], in between sigma/alpha is interpolated linearly, as diffusers does; or integer
                times (B,).

        Returns:
            Two Python floats, or two (B,) float32 tensors on t's device.

        Raises:
            ValueError: a number t outside of [0, T − 1].
        """
        if isinstance(t, Tensor):
            alpha_bar = self.alpha_bar.to(t.device)[t]
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if not 0 <= t <= self.T - 1:
            raise ValueError(f"t is {t:g}; this schedule has the times 0 to {self.T - 1}")
        return amplitudes(interpolate(t, self.nsr))


@dataclass(frozen=True)
class Flow:
    """The straight path of flow matching: alpha = 1 − sigma, sigma = shift·u/(1 + (shift − 1)·u), u = t/T.

    Lipman et al. (arXiv 2210.02747); the shift is Stable Diffusion 3's (arXiv 2403.03206, section 5.3.2).

    >>> Flow(shift=3.0)(500.0)
    (0.25, 0.75)
    """

    shift: float = 1.0
    T: int = 1000

    def __call__(self, t: float | Tensor) -> tuple:
        """(alpha, sigma) of t in [0, T], numbers or tensors."""
        sigma = self.shift * t / (self.T + (self.shift - 1) * t)
        return 1 - sigma, sigma


@dataclass(frozen=True)
class EDM:
    """Variance exploding: alpha = 1, sigma = exp(4·t); the net is fed t = ln(sigma)/4 (arXiv 2206.00364, table 1).

    >>> EDM()(0.0)
    (1.0, 1.0)
    """

    def __call__(self, t: float | Tensor) -> tuple:
        """(alpha, sigma) of any t, numbers or tensors."""
        return (torch.ones_like(t), (4 * t).exp()) if isinstance(t, Tensor) else (1.0, math.exp(4 * t))


SD = Discrete.from_betas(scaled_linear_betas())
DDPM = Discrete.from_betas(linear_betas())

"""Samplers: ways down a grid of noise levels. Each is a generator; to watch the process is to iterate it.

All call `denoise(x, level) -> Pred` and yield n + 1 `Step`s, the first (grid[0], start, None). Notation in the bodies:
t, a, s are time, alpha and sigma of the level at hand, a1, s1 of the next one.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.grid import Grid
from minidiff.schedule import Level


class Step(NamedTuple):
    """Where a sampler stands: the level, the state x there, and the guess x0 that led to it (None at the start)."""

    level: Level
    x: Tensor
    x0: Tensor | None


def ddim(denoise: Callable, x: Tensor, grid: Grid, *, eta: float = 0.0,
         noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16); on the right grids also DDPM and both Eulers.

        x' = alpha'·x0 + √(sigma'² − w²)·eps + w·z,   w = eta·sigma'·√(1 − r²),   r = sigma'·alpha/(alpha'·sigma)

    Args:
        denoise: (x, level) -> Pred. x: (B,...), the start, `grid.start(z)`.
        eta: 0 deterministic, 1 ancestral. noise: like -> fresh unit noise, asked for only where w > 0.

    Matches: DDIMScheduler, tests/parity/test_samplers.py.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = ddim(point, torch.tensor(1.0), preset("sd-euler", 5)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        r = s1 * a / (a1 * s)                                    # exp(−h): noise-to-signal after over before
        w = eta * s1 * math.sqrt(max(0.0, 1 - r * r))            # std of the fresh noise, eq. 16
        x = a1 * x0 + math.sqrt(s1 * s1 - w * w) * eps
        if w: x = x + w * noise(x)
        yield Step(nxt, x, x0)


def ddpm(denoise: Callable, x: Tensor, grid: Grid, *,
         noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2, variance "fixed_small"): ddim with eta = 1.

    Grid: variance-preserving, down to (alpha, sigma) = (1, 0); no noise is drawn on the last step.
    Matches: DDPMScheduler.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = ddpm(point, torch.tensor(1.0), preset("sd-ddpm", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid, eta=1.0, noise=noise)


def euler(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE in x/alpha over sigma/alpha: ddim with eta = 0.

    Karras et al. 2022 (arXiv 2206.00364, algorithm 1 without churn). Order 1. Matches: EulerDiscreteScheduler.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = euler(point, torch.tensor(1.0), preset("sd-euler", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid)


def euler_ancestral(denoise: Callable, x: Tensor, grid: Grid, *,
                    noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Euler down to a lower level, then fresh noise up to the next (k-diffusion): ddim with eta = 1.

    One draw per step but the last, where there is nothing to add. Matches: EulerAncestralDiscreteScheduler.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = euler_ancestral(point, torch.tensor(1.0), preset("sd-euler-ancestral", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid, eta=1.0, noise=noise)


def heun(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Heun's method as a chord: the step is repeated with the mean of both ends' x0 and eps.

        x' = x + (alpha' − alpha)·mean(x0) + (sigma' − sigma)·mean(eps)

    Karras et al. 2022 (arXiv 2206.00364, algorithm 1). Order 2; two network calls per step, one on a step to sigma = 0.
    Matches: HeunDiscreteScheduler on its grid (alpha = 1); the result depends on the coordinates of the grid.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = heun(point, torch.tensor(1.0), preset("sd-heun", 5)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        if s1 > 0:
            ahead = denoise(a1 * x0 + s1 * eps, nxt)
            x = x + (a1 - a) / 2 * (x0 + ahead.x0) + (s1 - s) / 2 * (eps + ahead.eps)
        else:
            x = a1 * x0
        yield Step(nxt, x, x0)


def lms(denoise: Callable, x: Tensor, grid: Grid, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: the polynomial through the last eps, integrated exactly over u = sigma/alpha (k-diffusion).

        x'/alpha' = x/alpha + ∫ Σ_j eps_j L_j(u) du,   L_j the Lagrange polynomials of the last `order` values of u

    Raises:
        ValueError: order is not in 1 … 4, or a level has alpha = 0, where u is infinite.

    Matches: LMSDiscreteScheduler.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = lms(point, torch.tensor(1.0), preset("sd-lms", 5)); last.x
    tensor(3.)
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order is {order}; linear multistep takes 1 to 4")
    if grid[0].alpha == 0:
        raise ValueError("lms works in sigma/alpha, infinite at alpha = 0 (zero terminal SNR); use ddim or dpmpp_2m")
    yield Step(grid[0], x, None)
    us, past = [], []
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        us, past = [s / a, *us][:order], [eps, *past][:order]
        weights = lagrange_integrals(us, s / a, s1 / a1)
        x = a1 * (x / a + sum(weight * e for weight, e in zip(weights, past)))
        yield Step(nxt, x, x0)


def lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """∫ from start to end of each Lagrange polynomial of up to four nodes: exact by Gauss's two points (degree ≤ 3).

    >>> [round(weight, 9) for weight in lagrange_integrals([1.0, 2.0], 1.0, 0.0)]      # Adams-Bashforth 2: −(3/2, −1/2)
    [-1.5, 0.5]
    """
    mid, half = (start + end) / 2, (end - start) / 2
    points = (mid - half / math.sqrt(3), mid + half / math.sqrt(3))
    return [half * sum(math.prod((p - m) / (node - m) for m in nodes if m != node) for p in points) for node in nodes]


def dpmpp_2m(denoise: Callable, x: Tensor, grid: Grid, *, lower_order_final: bool = True) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): ddim with x0 extrapolated over lam.

        x' = (sigma'/sigma)·x + (alpha' − sigma'·alpha/sigma)·D,   D = x0 + (x0 − x0_before)·h/(2·h_before),
        h = lam' − lam,   lam = ln(alpha/sigma)

    The first step and one to sigma = 0 are of order 1, with lower_order_final also the last of fewer than 15.
    Order 2, one network call per step. Matches: DPMSolverMultistepScheduler.

    >>> from minidiff.grid import preset
    >>> from minidiff.prediction import Pred
    >>> point = lambda x, level: Pred(torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma)   # all data is 3
    >>> *_, last = dpmpp_2m(point, torch.tensor(1.0), preset("sd-dpmpp", 5)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    before, h_before = None, math.inf
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, _ = denoise(x, now)
        guess, h = x0, _lam(nxt) - _lam(now)
        if before is not None and s1 > 0 and not (lower_order_final and grid.n < 15 and nxt is grid[-1]):
            guess = x0 + (h / (2 * h_before)) * (x0 - before)
        x = (s1 / s) * x + (a1 - s1 * a / s) * guess
        before, h_before = x0, h
        yield Step(nxt, x, x0)


def _lam(level: Level) -> float:
    _, a, s = level
    return math.log(a / s) if a and s else math.copysign(math.inf, a - s)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "euler_ancestral": euler_ancestral, "heun": heun, "lms": lms,
            "dpmpp_2m": dpmpp_2m}
NAMES = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "EulerDiscreteScheduler": "euler",
         "EulerAncestralDiscreteScheduler": "euler_ancestral", "HeunDiscreteScheduler": "heun",
         "LMSDiscreteScheduler": "lms", "DPMSolverMultistepScheduler": "dpmpp_2m"}
# Of each class, the options that would make it another algorithm, with the values that do not; like diffusers, we
# ignore the options of other classes
ACCEPTED = {
    "DDIMScheduler": {"thresholding": (False,)},
    "DDPMScheduler": {"thresholding": (False,), "variance_type": ("fixed_small",)},
    "EulerDiscreteScheduler": {"timestep_type": ("discrete",)},
    "DPMSolverMultistepScheduler": {
        "thresholding": (False,), "algorithm_type": ("dpmsolver++",), "solver_order": (2,), "euler_at_final": (False,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2")},  # diffusers reads the other solvers' names as midpoint
}


def from_config(config: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The sampler that a diffusers `scheduler_config.json` means, and its keyword arguments.

    `clip_sample` is a statement about x0, not about the sampler: wrap the denoiser with `guidance.clip`.

    Raises:
        ValueError: a class or an option that is not supported, by name.

    >>> from_config({"_class_name": "DPMSolverMultistepScheduler"})[1]
    {'lower_order_final': True}
    """
    name = config.get("_class_name")
    if name not in NAMES:
        raise ValueError(f"scheduler {name!r} is not supported; supported are {', '.join(NAMES)}")
    for key, values in ACCEPTED.get(name, {}).items():
        if config.get(key) not in (None, *values):
            raise ValueError(f"{name} with {key} = {config[key]!r} is not supported; supported is {values[0]!r}")
    options = {"lower_order_final": config.get("lower_order_final", True)} if NAMES[name] == "dpmpp_2m" else {}
    return SAMPLERS[NAMES[name]], options

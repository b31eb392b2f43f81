"""Samplers: ways down a grid of noise levels. Each is a generator; to watch the process is to iterate it.

All call `denoise(x, level) -> Pred` and yield n + 1 `Step`s, the first (grid[0], start, None). Notation in the bodies:
t, a, s are time, alpha and sigma of the level at hand, a1, s1 of the next one.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from minidiff.grid import Grid, Step, between
from minidiff.multistep import dpmpp_2m, dpmpp_2m_sde, lms, plms, unipc
from minidiff.schedule import Level


def ddim(denoise: Callable, x: Tensor, grid: Grid, *, eta: float = 0.0,
         noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16); on the right grids also DDPM and both Eulers.

        x' = alpha'·x0 + √(sigma'² − σz²)·eps + σz·z,   σz = eta·sigma'·√(1 − (u'/u)²),   u = sigma/alpha

    Args:
        denoise: (x, level) -> Pred. x: (B,...), the start, `grid.start(z)`.
        eta: 0 deterministic, 1 ancestral. noise: like -> fresh unit noise, asked for only where σz > 0.

    Matches: DDIMScheduler, tests/parity/test_samplers.py.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = ddim(oracle(3.0), torch.tensor(1.0), preset("sd-euler", 5)); last.x
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

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = ddpm(oracle(3.0), torch.tensor(1.0), preset("sd-ddpm", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid, eta=1.0, noise=noise)


def ddpm_large(denoise: Callable, x: Tensor, grid: Grid, *,
               noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Ancestral sampling with the larger variance (Ho et al. 2020, section 3.2, "fixed_large"): the forward step's.

        x' = alpha'·x0 + sigma'·r·eps + sigma·√(1 − r²)·z,   r = sigma'·alpha/(alpha'·sigma)

    The mean is ddpm's, whose noise is sigma'·√(1 − r²): right for data of no width, this one for data N(0, 1).
    Grid: as ddpm's. Matches: DDPMScheduler with variance_type "fixed_large".

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = ddpm_large(oracle(3.0), torch.tensor(1.0), preset("sd-ddpm", 5)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        r = s1 * a / (a1 * s)
        x = a1 * x0 + s1 * r * eps
        if s1: x = x + s * math.sqrt(max(0.0, 1 - r * r)) * noise(x)
        yield Step(nxt, x, x0)


def euler(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Euler's method for the probability-flow ODE in x/alpha over sigma/alpha: ddim with eta = 0.

    Karras et al. 2022 (arXiv 2206.00364, algorithm 1, first half). Order 1. Matches: EulerDiscreteScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = euler(oracle(3.0), torch.tensor(1.0), preset("sd-euler", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid)


def euler_churn(denoise: Callable, x: Tensor, grid: Grid, *, churn: float, low: float = 0.0, high: float = math.inf,
                inflate: float = 1.0, time: Callable[[float], float] | None = None,
                noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Euler with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2): before each step a little noise is added.

        û = u·(1 + γ),   x̂ = x + alpha·√(û² − u²)·inflate·z,   γ = min(churn/n, √2 − 1),   u = sigma/alpha

    and Euler's step goes from û to the next level. What is added repairs what earlier steps got wrong.

    Args:
        churn: the paper's S_churn, about n·γ. 0 is euler. low, high: S_tmin and S_tmax, the u between which it acts.
        inflate: S_noise. time: from û to what the net is fed there; None: the level's own t.

    Matches: k-diffusion's sample_euler, test_churn_equals_k_diffusion.
    NOTE: diffusers' Euler asks the network before it adds the noise: test_diffusers_churns_after_it_has_asked.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = euler_churn(oracle(3.0), torch.tensor(1.0), preset("sd-euler", 5), churn=1.0); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        (t, a, s), (_, a1, s1) = now, nxt
        if churn > 0 and low <= s / a <= high:
            up = 1 + min(churn / grid.n, math.sqrt(2) - 1)
            x = x + s * math.sqrt(up * up - 1) * inflate * noise(x)
            now = Level(time(up * s / a) if time else t, a, up * s)
        x0, eps = denoise(x, now)
        x = a1 * x0 + s1 * eps
        yield Step(nxt, x, x0)


def euler_ancestral(denoise: Callable, x: Tensor, grid: Grid, *, eta: float = 1.0,
                    noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Euler down to a lower level, then fresh noise up to the next (k-diffusion): ddim, here with eta = 1.

    One draw per step but the last, where there is nothing to add. Matches: EulerAncestralDiscreteScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = euler_ancestral(oracle(3.0), torch.tensor(1.0), preset("sd-euler-ancestral", 5)); last.x
    tensor(3.)
    """
    return ddim(denoise, x, grid, eta=eta, noise=noise)


def heun(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Heun's method as a chord: the step is repeated with the mean of both ends' x0 and eps.

        x' = x + (alpha' − alpha)·mean(x0) + (sigma' − sigma)·mean(eps)

    Karras et al. 2022 (arXiv 2206.00364, algorithm 1). Order 2; two network calls per step, one on a step to sigma = 0.
    Matches: HeunDiscreteScheduler on its grid (alpha = 1); the result depends on the coordinates of the grid.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = heun(oracle(3.0), torch.tensor(1.0), preset("sd-heun", 5)); last.x
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


def dpmpp_sde(denoise: Callable, x: Tensor, grid: Grid, *, eta: float = 1.0,
              time: Callable[[float], float] | None = None,
              noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """DPM-Solver++ SDE (Lu et al. 2022, arXiv 2211.01095; k-diffusion): ddim's step with the x0 seen half-way.

        x_m = ddim(x, x0, to u_m) + noise z_1,   x' = ddim(x, x0(x_m), to u') + noise √k·z_1 + √(1 − k)·z_2,
        u = sigma/alpha,   u_m = √(u·u'),   k = (u − u_m)/(u − u')

    The noise of the half step is part of the whole step's: both are increments of one Brownian path over u.
    Two network calls per step, one on a step to sigma = 0.

    Args:
        eta: 1 the SDE, 0 the ODE. time: see `minidiff.grid.between`.

    Raises:
        ValueError: a level has alpha = 0, where u is infinite.

    Matches: DPMSolverSDEScheduler with the same Brownian path (tests/parity/test_stochastic.py).

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = dpmpp_sde(oracle(3.0), torch.tensor(1.0), preset("sd-dpmpp-sde", 5)); last.x
    tensor(3.)
    """
    if grid[0].alpha == 0:
        raise ValueError("dpmpp_sde halves a step in ln(sigma/alpha), infinite at alpha = 0 (zero terminal SNR); use "
                         "ddim or dpmpp_2m_sde")

    def step(x0: Tensor, z: Tensor, to: Level) -> Tensor:
        (_, a, s), (_, a1, s1) = now, to
        w = eta * s1 * math.sqrt(max(0.0, 1 - (s1 * a / (a1 * s)) ** 2))
        return a1 * x0 + math.sqrt(s1 * s1 - w * w) * (x - a * x0) / s + w * z

    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        x0, _ = denoise(x, now)
        if nxt.sigma == 0:
            x = nxt.alpha * x0
        else:
            mid, z = between(now, nxt, time), noise(x)
            guess, _ = denoise(step(x0, z, mid), mid)
            u, m, u1 = (sigma / alpha for _, alpha, sigma in (now, mid, nxt))
            k = (u - m) / (u - u1) if u > u1 else 0.0
            x = step(guess, math.sqrt(k) * z + math.sqrt(1 - k) * noise(x), nxt)
        yield Step(nxt, x, x0)


def lcm(denoise: Callable, x: Tensor, grid: Grid, *, scaling: float = 10.0,
        noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3): to the end in one go, then back up.

        x' = alpha'·f + sigma'·z,   f = c_skip·x + c_out·x0,   c_skip = d²/(u² + d²),   c_out = u/√(u² + d²),
        u = scaling·t,   d = ½

    Grid: preset "lcm". No noise is drawn on the last step. Matches: LCMScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = lcm(oracle(3.0), torch.tensor(1.0), preset("lcm", 4)); round(last.x.item(), 3)
    3.0
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        (t, _, _), (_, a1, s1) = now, nxt
        x0, _ = denoise(x, now)
        u = scaling * t
        x = a1 * (0.25 / (u * u + 0.25) * x + u / math.hypot(u, 0.5) * x0)
        if s1: x = x + s1 * noise(x)
        yield Step(nxt, x, x0)


def consistency(denoise: Callable, x: Tensor, grid: Grid, *,
                noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1): x0, then noise up to the next.

        x' = alpha'·x0 + √(sigma'² − sigma_min²)·z,   sigma_min: that of the last level, where no noise is drawn

    `denoise` is the consistency function: its x0 lies on the data at any level.
    Matches: CMStochasticIterativeScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = consistency(oracle(3.0), torch.tensor(1.0), preset("sd-euler", 3)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    for now, nxt in pairwise(grid):
        x0, _ = denoise(x, now)
        w = math.sqrt(max(0.0, nxt.sigma**2 - grid[-1].sigma**2))
        x = nxt.alpha * x0
        if w: x = x + w * noise(x)
        yield Step(nxt, x, x0)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "ddpm_large": ddpm_large, "euler": euler, "euler_ancestral": euler_ancestral,
            "heun": heun, "lms": lms, "plms": plms, "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde,
            "dpmpp_sde": dpmpp_sde, "unipc": unipc, "lcm": lcm}
ETA = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde")  # take eta, the share of fresh noise

"""Multistep samplers: the network's last answers, combined, give a better step at no further call.

As in `minidiff.samplers`, where they are found too: t, a, s are time, alpha and sigma of the level at hand, a1, s1 of
the next one, and lam = ln(alpha/sigma).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from minidiff.grid import Grid, Step
from minidiff.schedule import Level
from minidiff.values import whole

SAME = 1e-6  # a step in lam that is no larger is of no size: the levels are one, but for rounding
ADAMS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def lms(denoise: Callable, x: Tensor, grid: Grid, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep: the polynomial through the last eps, integrated exactly over u = sigma/alpha (k-diffusion).

        x'/alpha' = x/alpha + ∫ Σ_j eps_j L_j(u) du,   L_j the Lagrange polynomials of the last `order` values of u

    Raises:
        ValueError: order is not in 1 … 4, or a level has alpha = 0, where u is infinite.

    Matches: LMSDiscreteScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = lms(oracle(3.0), torch.tensor(1.0), preset("sd-lms", 5)); last.x
    tensor(3.)
    """
    order = whole("order", order, 1, 4, f"order is {order}; linear multistep takes 1 to 4")
    if grid[0].alpha == 0:
        raise ValueError("lms works in sigma/alpha, infinite at alpha = 0 (zero terminal SNR); use ddim or dpmpp_2m")
    yield Step(grid[0], x, None)
    us, past = [], []
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        again = bool(us) and us[0] - s / a <= SAME * us[0]           # no step was taken: only one answer counts
        us, past = [s / a, *us[again:]][:order], [eps, *past[again:]][:order]
        weights = lagrange_integrals(us, s / a, s1 / a1)
        x = a1 * (x / a + sum(weight * e for weight, e in zip(weights, past)))
        yield Step(nxt, x, x0)


def plms(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778, eq. 12): ddim with the last four eps combined.

        eps ← (55·eps_i − 59·eps_{i−1} + 37·eps_{i−2} − 9·eps_{i−3})/24   (Adams-Bashforth, of lower order at first)

    The first step averages the eps of both its ends, as CompVis' code does: one network call more. Order 2, as these
    are the weights of equal steps. Matches: PNDMScheduler with skip_prk_steps.
    NOTE: a slice starts afresh, diffusers cuts the second call off: test_a_slice_starts_plms_with_two_calls.
    NOTE: of v-predictions diffusers averages v, which is of order 1: test_plms_averages_eps_whatever_the_kind.

    Raises:
        ValueError: a level has alpha = 0.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = plms(oracle(3.0), torch.tensor(1.0), preset("sd-dpmpp", 5)); round(last.x.item(), 3)
    3.0
    """
    if grid[0].alpha == 0:
        raise ValueError("plms divides by alpha, 0 at zero terminal SNR; use ddim, dpmpp_2m or unipc")
    yield Step(grid[0], x, None)
    past, again = [], False
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, eps = denoise(x, now)
        past, again = [eps, *past[again:]][:4], _lam(nxt) - _lam(now) <= SAME
        if len(past) > 1:
            eps = sum(weight * e for weight, e in zip(ADAMS[len(past)], past))
        elif len(grid) > 2 and s1 > 0:
            eps = (eps + denoise(a1 * x0 + s1 * eps, nxt).eps) / 2
        x = (a1 / a) * x + (s1 - a1 * s / a) * eps
        yield Step(nxt, x, x0)


def dpmpp_2m(denoise: Callable, x: Tensor, grid: Grid, *, lower_order_final: bool = True) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): ddim with x0 extrapolated over lam.

        x' = (sigma'/sigma)·x + (alpha' − sigma'·alpha/sigma)·x̄0,   x̄0 = x0 + (x0 − x0_before)·h/(2·h_before),
        h = lam' − lam,   lam = ln(alpha/sigma)

    The first step and one to sigma = 0 are of order 1, with lower_order_final also the last of fewer than 15.
    Order 2, one network call per step. Matches: DPMSolverMultistepScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = dpmpp_2m(oracle(3.0), torch.tensor(1.0), preset("sd-dpmpp", 5)); last.x
    tensor(3.)
    """
    return dpmpp_2m_sde(denoise, x, grid, eta=0.0, lower_order_final=lower_order_final)


def dpmpp_2m_sde(denoise: Callable, x: Tensor, grid: Grid, *, eta: float = 1.0, lower_order_final: bool = True,
                 noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, appendix B; k-diffusion): dpmpp_2m with fresh noise.

        x' = (sigma'/sigma)·q·x + (alpha' − sigma'·alpha/sigma·q)·x̄0 + sigma'·√(1 − q²)·z,   q = e^(−eta·h)

    h and x̄0 as in dpmpp_2m, which is eta = 0; with eta = 1 and x̄0 = x0 it is ddpm. Order 2, in distribution.
    Matches: DPMSolverMultistepScheduler with algorithm_type "sde-dpmsolver++", tests/parity/test_stochastic.py.

    Args:
        eta: how much of the noise is fresh, in [0, 1].

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = dpmpp_2m_sde(oracle(3.0), torch.tensor(1.0), preset("sd-dpmpp", 5)); last.x
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
        q = (s1 * a / (a1 * s)) ** eta                           # e^(−eta·h)
        x = (s1 / s) * q * x + (a1 - s1 * a / s * q) * guess
        if s1 * (1 - q) > 0: x = x + s1 * math.sqrt(1 - q * q) * noise(x)
        if h > SAME: before, h_before = x0, h
        yield Step(nxt, x, x0)


def unipc(denoise: Callable, x: Tensor, grid: Grid, *, lower_order_final: bool = True) -> Iterator[Step]:
    """UniPC-2 with B(h) = e^h − 1 (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 and 6): dpmpp_2m, then corrected.

        x' = (sigma'/sigma)·x + (alpha' − sigma'·alpha/sigma)·(x0 + p·d + q·(x0' − x0)),
        d = (x0 − x0_before)·h/h_before

    The prediction has p = ½, q = 0. Once x0' is known at its end, the step is taken again, at no further call, with
    the p and q that are exact where x0 is quadratic in lam. Of order 1 (d = 0, q = ½) are the first step, one to
    sigma = 0, and with lower_order_final the last: order 2 then, else 3. Matches: UniPCMultistepScheduler.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> *_, last = unipc(oracle(3.0), torch.tensor(1.0), preset("sd-unipc", 5)); last.x
    tensor(3.)
    """
    yield Step(grid[0], x, None)
    correct = h_before = before = None
    for now, nxt in pairwise(grid):
        (_, a, s), (_, a1, s1) = now, nxt
        x0, _ = denoise(x, now)
        x = correct(x0) if correct else x
        correct, h, d, p, q = None, _lam(nxt) - _lam(now), 0.0, 0.0, 0.5
        if h > SAME and before is not None and s1 > 0 and not (lower_order_final and nxt is grid[-1]):
            d = (h / h_before) * (x0 - before)
            p, q = corrector(h, h_before)
        step = partial(_step, (s1 / s) * x, a1 - s1 * a / s, x0)
        x = step(d / 2, 0.0, x0)
        if h > SAME: correct, h_before, before = partial(step, p * d, q), h, x0
        yield Step(nxt, x, x0)


def lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """∫ from start to end of each Lagrange polynomial of up to four nodes: exact by Gauss's two points (degree ≤ 3).

    >>> [round(weight, 9) for weight in lagrange_integrals([1.0, 2.0], 1.0, 0.0)]      # Adams-Bashforth 2: −(3/2, −1/2)
    [-1.5, 0.5]
    """
    mid, half = (start + end) / 2, (end - start) / 2
    points = (mid - half / math.sqrt(3), mid + half / math.sqrt(3))
    return [half * sum(math.prod((p - m) / (node - m) for m in nodes if m != node) for p in points) for node in nodes]


def corrector(h: float, h_before: float) -> tuple[float, float]:
    """UniC's p and q (Zhao et al. 2023, arXiv 2302.04867, algorithm 5): exact for x0 linear and quadratic in lam.

        x̄0 = x0 + p·d + q·(x0' − x0),   d = (x0 − x0_before)·h/h_before,   x̄0: the mean under the weight e^lam

    Args:
        h: the length in lam of the step at hand, positive.
        h_before: that of the step before it, positive.

    Returns:
        p and q of the formula.

    >>> [round(weight, 3) for weight in corrector(0.01, 0.01)]      # short steps: Adams-Moulton's 1/12 and 5/12
    [0.083, 0.418]
    """
    B, r = math.expm1(-h), -h_before / h
    first = (-B / h - 1) / B                                     # the right sides, φ·i!/B
    second = 2 * ((-B / h - 1) / -h - 0.5) / B
    p = (first - second) / (1 - r)
    return p, first - p


def _step(kept: Tensor, gain: float, x0: Tensor, change: Tensor | float, q: float, ahead: Tensor) -> Tensor:
    return kept + gain * (x0 + change + q * (ahead - x0))


def _lam(level: Level) -> float:
    _, a, s = level
    return math.log(a / s) if a and s else math.copysign(math.inf, a - s)

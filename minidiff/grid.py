"""Grids: the noise levels that a sampler visits, from noise to data. What schedulers elsewhere hide is here."""
from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from minidiff.schedule import Flow, Level
from minidiff.values import number, whole


class Grid(tuple):
    """n + 1 levels from noise to data: grid[0] is where the first state stands, grid[-1] where the last one does.

    Args:
        levels: at least two `Level`s, sigma/alpha never rising; infinite (alpha = 0) at most at the first, 0 (sigma =
            0) at most at the last. Where one stands twice, the step between is of no size.
        from_pure_noise: the start rule. True: x = sigma·z, as if the data were 0. False: x = √(alpha² + sigma²)·z,
            the full variance of x for data of unit variance.
        n: number of steps of the whole grid; slices keep it (and the start rule).

    Raises:
        ValueError: fewer than two levels, a level that is not three finite numbers, or one noisier than the one before
            it, or all noise or all data where others are left.

    >>> from minidiff.sd.scheduler import preset
    >>> grid = preset("sd-ddim", 4)
    >>> [level.t for level in grid], grid.n, grid[2:].n
    ([751.0, 501.0, 251.0, 1.0, 0.0], 4, 4)
    """

    from_pure_noise: bool
    n: int

    def __new__(cls, levels: Iterable[Level], from_pure_noise: bool = False, n: int | None = None) -> Grid:
        try:
            self = super().__new__(cls, [Level(*map(float, level)) for level in levels])
        except (TypeError, ValueError) as error:
            raise ValueError(f"a grid is made of levels (t, alpha, sigma), three numbers each: {error}") from error
        if len(self) < 2:
            raise ValueError(f"a grid needs at least 2 levels, this one has {len(self)}")
        for level in self:
            if not all(map(math.isfinite, level)):
                raise ValueError(f"a grid's levels are finite numbers, not {tuple(level)}; alpha = 0 needs sigma = 1")
        for now, nxt in zip(self, self[1:]):
            if not nxt.sigma * now.alpha <= now.sigma * nxt.alpha:
                raise ValueError(f"a grid runs from noise to data, but t = {now.t:g} is followed by t = {nxt.t:g}")
        for place, (t, alpha, sigma) in enumerate(self):
            if not (alpha > 0 or alpha == 0 == place) or not (sigma > 0 or sigma == 0 and place == len(self) - 1):
                raise ValueError(f"t = {t:g} has alpha = {alpha:g} and sigma = {sigma:g}; both are positive, but for "
                                 "alpha at a grid's first level and sigma at its last")
        self.from_pure_noise, self.n = from_pure_noise, len(self) - 1 if n is None else n
        return self

    def __getitem__(self, index):
        """A level, or for a slice a grid (a tuple, if it is too short for one)."""
        part = super().__getitem__(index)
        if isinstance(index, slice) and len(part) > 1 and hasattr(self, "n"):
            return Grid(part, self.from_pure_noise, self.n)
        return part

    def start(self, z: Tensor) -> Tensor:
        """Turn unit noise into the first state."""
        _, alpha, sigma = self[0]
        scale = sigma if self.from_pure_noise else math.hypot(alpha, sigma)
        return z if scale == 1 else scale * z


class Step(NamedTuple):
    """Where a sampler stands: the level, the state x there, and the guess x0 that led to it (None at the start)."""

    level: Level
    x: Tensor
    x0: Tensor | None


def times(spacing: str, n: int, T: int, offset: int = 0, extra: int = 0) -> list[float]:
    """n training times from high to low: diffusers' `timestep_spacing`, before any rounding.

    leading: i·(T // n) + offset; linspace: T − 1 … 0 in equal steps; trailing: T − 1 and down in steps of T/n, whole.
    DPM-Solver++ has the first n of n + 1 leading or linspace times: `extra` is then 1.

    Raises:
        ValueError: n is not in 1 … T − extra, the spacing is unknown, or the offset leads beyond T − 1.

    >>> times("leading", 4, 1000, 1), times("trailing", 3, 1000)
    ([751.0, 501.0, 251.0, 1.0], [999.0, 666.0, 332.0])
    """
    text = f"{n} sampling steps; a schedule of {T} training steps allows 1 to {T - extra}, whole ones"
    n = whole("steps", n, 1, T - extra, text)
    count = n + extra
    if spacing == "leading":
        ts = [float(i * (T // count) + offset) for i in reversed(range(extra, count))]
        if ts[0] > T - 1:
            raise ValueError(f"{n} steps with steps_offset {offset} would start at t = {ts[0]:g}, after the last "
                             f"training time {T - 1}; take fewer steps")
        return ts
    if spacing == "linspace":
        step = (T - 1) / max(1, count - 1)
        return [float(T - 1), *(i * step for i in reversed(range(extra, count - 1)))] if count > 1 else [0.0]
    if spacing == "trailing":
        # NOTE: diffusers' arange has an (n+1)-th entry, t = −1, for 62 values of n: test_trailing_has_exactly_n_times
        step = (T - T / n) - T  # NumPy's arange has this rounded step, which decides ties such as 937.5
        return [float(round(T + i * step) - 1) for i in range(n)]
    raise ValueError(f"timestep_spacing is {spacing!r}; supported are leading, linspace and trailing")


def distilled(n: int, T: int, original: int = 50) -> list[float]:
    """n of the `original` times T//original apart for which a latent consistency model was distilled (2310.04378 §4.3).

    Raises:
        ValueError: n is not in 1 … original.

    >>> distilled(4, 1000)
    [999.0, 759.0, 499.0, 259.0]
    """
    text = f"{n} sampling steps; a model distilled for {original} steps allows 1 to {original}, whole ones"
    n = whole("steps", n, 1, original, text)
    apart, step = T // original, original / n
    return [float((original - int(i * step)) * apart - 1) for i in range(n)]


def spread(grid: Grid, n: int) -> Grid:
    """n steps from a grid's first level to its last, over levels of it about equally many apart.

    Raises:
        ValueError: the grid has fewer steps.

    >>> from minidiff.sd.scheduler import preset
    >>> [level.t for level in spread(preset("sd-ddim", 10)[5:], 2)]
    [401.0, 201.0, 0.0]
    """
    n, most = whole("steps", n, 1, 10**6), len(grid) - 1
    if n > most:
        raise ValueError(f"{n} sampling steps, but only {most} are left to choose from; take fewer, or more strength")
    return Grid([*(grid[int(i * (most / n))] for i in range(n)), grid[-1]], grid.from_pure_noise)


def karras(n: int, high: float, low: float, rho: float = 7.0) -> list[float]:
    """n noise-to-signal ratios, equal steps in their rho-th root (Karras et al., arXiv 2206.00364, eq. 5).

    >>> [round(u, 2) for u in karras(3, 10.0, 0.1)]
    [10.0, 1.45, 0.1]
    """
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [high, *((a + i / (n - 1) * (b - a)) ** rho for i in range(1, n - 1)), low][:n]


def exponential(n: int, high: float, low: float) -> list[float]:
    """n noise-to-signal ratios in equal steps of their logarithm (k-diffusion).

    >>> [round(u, 2) for u in exponential(3, 10.0, 0.1)]
    [10.0, 1.0, 0.1]
    """
    ratio = low / high
    return [high, *(high * ratio ** (i / (n - 1)) for i in range(1, n - 1)), low][:n]


def beta(n: int, high: float, low: float, a: float = 0.6) -> list[float]:
    """n noise-to-signal ratios at quantiles of a beta(a, a): many near both ends (Lee et al., arXiv 2407.12173).

    >>> [round(u, 2) for u in beta(5, 10.0, 0.1)]
    [10.0, 8.26, 5.05, 1.84, 0.1]
    """
    import numpy as np

    s = np.linspace(0, 0.5**a, 2**16)                     # of y = s^(1/a) up to the middle: its density is smooth in s
    density = (1 - s ** (1 / a)) ** (a - 1)
    below = np.cumsum(density) - (density[0] + density) / 2          # trapezia
    half = np.interp([min(i, n - 1 - i) / max(1, n - 1) for i in range(n)], below / (2 * below[-1]), s) ** (1 / a)
    return [float(low + (y if 2 * i > n - 1 else 1 - y) * (high - low)) for i, y in enumerate(half)]


def between(now: Level, nxt: Level, time: Callable[[float], float] | None = None) -> Level:
    """The level half-way between two in ln(sigma/alpha).

    Args:
        time: from sigma/alpha to what the net is fed there; None: half-way between the times of the two.

    >>> between(Level(900.0, 1.0, 4.0), Level(500.0, 1.0, 1.0))
    Level(t=700.0, alpha=1.0, sigma=2.0)
    """
    alpha, sigma = math.sqrt(now.alpha * nxt.alpha), math.sqrt(now.sigma * nxt.sigma)
    return Level(time(sigma / alpha) if time else (now.t + nxt.t) / 2, alpha, sigma)


def flow(n: int, shift: float = 1.0) -> Grid:
    """Flow matching: alpha = 1 − sigma, n equal steps of u from 1 down, shifted; the lower end twice, as in diffusers.

    Raises:
        ValueError: n is no whole number of at least 1, or shift is not positive.

    Matches: FlowMatchEulerDiscreteScheduler, test_flow_grid_equals_diffusers.

    >>> [round(level.sigma, 3) for level in flow(3)]
    [1.0, 0.5, 0.001, 0.0]
    """
    n, shift = whole("steps", n, 1, 10**6), number("shift", shift)
    if shift <= 0:
        raise ValueError(f"shift is {shift:g}; it must be positive")
    schedule = Flow(shift)
    last = schedule(1.0)[1]                                          # diffusers' sigma_min: the shifted 1/T
    us = [1 + i / max(1, n - 1) * (last - 1) for i in range(n)]
    levels = [Level(1000 * sigma, 1 - sigma, sigma) for sigma in (schedule(1000 * u)[1] for u in us)]
    return Grid([*levels, Level(0.0, 1.0, 0.0)])


def inverse(nsr: float, table: Sequence[float]) -> float:
    """The fractional time of a noise-to-signal ratio in a rising table, linear in its logarithm.

    >>> inverse(10.0, [1.0, 100.0])
    0.5
    """
    high = min(max(bisect.bisect_left(table, nsr), 1), len(table) - 1)
    low, logs = high - 1, [math.log(table[high - 1]), math.log(table[high])]
    return min(max(low + (math.log(nsr) - logs[0]) / (logs[1] - logs[0]), 0.0), len(table) - 1.0)

"""Grids: the published times and noise levels, the start rules, slices, and every refusal with its sentence."""

import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from minidiff.grid import Grid, flow, karras, spread, times
from minidiff.schedule import SD, Discrete, Level, zero_terminal_snr
from minidiff.sd.scheduler import from_diffusers, preset

pytestmark = pytest.mark.quick
DDIM, DDPM, EULER, HEUN = "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"
ANCESTRAL, LMS, DPM = "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler"
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
LINSPACE, KARRAS = {"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}
KARRAS_TIMES = [999, 916.284, 815.045, 687.153, 523.199, 327.147, 145.939, 40.857, 6.732, 0]
DPM_TIMES = [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]


def falling(first, step):
    return [first - i * step for i in range(10)]


# class, options, the times of 10 steps, the first two and the last two sigma/alpha, the size of the start
@pytest.mark.parametrize("name, options, ts, first, last, size", [
    (DDIM, LEADING, falling(901, 100), None, None, 1),
    (DDPM, LEADING, falling(901, 100), None, None, 1),
    (DDIM, LINSPACE, falling(999, 111), None, None, 1),
    (DDPM, TRAILING, falling(999, 100), None, None, 1),
    (EULER, LEADING, falling(901, 100), (8.39069, 5.13443), (0.04131, 0), 8.450067),
    (ANCESTRAL, LINSPACE, falling(999, 111), (14.61465, 7.83988), (0.02917, 0), 14.614647),
    (LMS, TRAILING, falling(999, 100), (14.61465, 8.30281), (0.34167, 0), 14.614647),
    (EULER, KARRAS, KARRAS_TIMES, (14.61465, 9.10294), (0.02917, 0), 14.614647),
    (LMS, KARRAS, KARRAS_TIMES, (14.61465, 9.10294), (0.02917, 0), 14.614647),
    (HEUN, {}, falling(999, 111), (14.61465, 7.83988), (0.02917, 0), 14.614647),
    (DPM, {}, DPM_TIMES, (14.61465, 8.30281), (0.34393, 0), 1),
    (DPM, LEADING, falling(901, 90), (8.39069, 5.37634), (0.32353, 0), 1),
    (DPM, KARRAS, [round(t) for t in KARRAS_TIMES], (14.61465, 9.10294), (0.02917, 0), 1),
])
def test_ten_steps_are_the_published_ones(name, options, ts, first, last, size):
    levels = from_diffusers({"_class_name": name, **options}, 10, SD)
    assert [level.t for level in levels] == pytest.approx([*ts, 0], abs=1e-3)
    nsr = [level.sigma / level.alpha for level in levels]
    assert nsr[:2] + nsr[-2:] == pytest.approx([*(first or (SD.nsr[ts[0]], SD.nsr[ts[1]])),
                                                *(last or (SD.nsr[ts[-1]], 0))], abs=8e-6)  # 5 digits, float32
    assert levels.start(torch.ones(1)).item() == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize("name", [DDIM, DDPM, DPM])
def test_these_grids_are_variance_preserving(name):
    assert all(math.hypot(a, s) == pytest.approx(1) for _, a, s in from_diffusers({"_class_name": name}, 10, SD))


@pytest.mark.parametrize("name, cap", [(DDIM, math.inf), (EULER, 4096), (DPM, 4096)])
def test_zero_terminal_snr_starts_at_alpha_zero_or_at_the_published_cap(name, cap):
    config = {"_class_name": name, "rescale_betas_zero_snr": True, **TRAILING}
    levels = from_diffusers(config, 10, Discrete(zero_terminal_snr(SD.alpha_bar)))
    if name == DDIM:
        assert levels[0] == (999.0, 0.0, 1.0)
    else:
        assert levels[0].sigma / levels[0].alpha == pytest.approx(cap, rel=1e-6)
    assert levels[1].sigma / levels[1].alpha == pytest.approx(18.13006, rel=1e-5)


def test_the_last_level_is_clean_or_the_first_of_the_table():
    ends = {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min"}
    for name, end in zip((DDIM, EULER, DPM), ends):
        first = from_diffusers({"_class_name": name, **end}, 10, SD)[-1]
        assert first.t == 0 and first.sigma / first.alpha == pytest.approx(0.029167535, rel=2e-6)
        assert from_diffusers({"_class_name": name}, 10, SD)[-1] == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("options, scale", [(LEADING, math.hypot(1, 8.39069)), (LINSPACE, 14.614647),
                                            (TRAILING, 14.614647)])
def test_start_has_full_variance_for_leading_and_pure_noise_otherwise(options, scale):
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    levels = from_diffusers({"_class_name": EULER, **options}, 10, SD)
    torch.testing.assert_close(levels.start(z), scale * z)
    vp = from_diffusers({"_class_name": DDIM, **options}, 10, SD)
    torch.testing.assert_close(vp.start(z), z)


def test_slices_keep_the_start_rule_and_the_full_number_of_steps():
    for levels in (preset("sd-euler", 20), preset("sd-ddim", 20)):
        part = levels[12:]
        assert type(part) is Grid and part.n == 20 and part.from_pure_noise == levels.from_pure_noise
        assert tuple(part) == tuple(levels)[12:] and part[3:][0] == levels[15] and part[3:].n == 20
        assert type(levels[3]) is Level
    assert preset("sd-euler", 20)[12:].start(torch.ones(1)).item() == pytest.approx(preset("sd-euler", 20)[12].sigma)
    assert type(preset("sd-ddim", 4)[3:4]) is tuple


def test_noise_must_fall():
    noisy, clean = Level(900.0, 0.1, 0.9), Level(0.0, 1.0, 0.0)
    assert Grid([noisy, clean]).n == 1
    with pytest.raises(ValueError, match="runs from noise to data, but t = 0 is followed by t = 900"):
        Grid([clean, noisy])
    with pytest.raises(ValueError, match="at least 2 levels, this one has 1"):
        Grid([noisy])


@pytest.mark.parametrize("levels, named", [
    ([(1, 1, 0), (0, 1, 0)], "t = 1 has alpha = 1 and sigma = 0"),
    ([(2, 0, 1), (1, 0, 1), (0, 1, 0)], "t = 1 has alpha = 0"),
    ([(1, -1, 1), (0, 1, 0)], "alpha = -1"), ([(1, 1, 1), (0, 1, -0.1)], "sigma = -0.1"),
    ([(1, 0, 0), (0, 1, 0)], "t = 1")])
def test_all_noise_and_all_data_have_their_places(levels, named):
    with pytest.raises(ValueError, match=f"{named}.*; both are positive, but for alpha at a grid's first level"):
        Grid(Level(*level) for level in levels)
    assert len(Grid([Level(1, 0, 1), Level(0.5, 1, 1), Level(0, 1, 0)])) == 3


@pytest.mark.parametrize("levels", [None, [1, 2], [(1, 2), (1, 2)], [("a", 1, 1), (0, 1, 0)],
                                    [(1, None, 1), (0, 1, 0)]])
def test_levels_are_three_numbers(levels):
    with pytest.raises(ValueError, match="a grid is made of levels .t, alpha, sigma., three numbers each"):
        Grid(levels)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, Fraction, Decimal])
def test_levels_are_kept_as_pythons_numbers(kind):
    grid = Grid([(kind(9), kind(0.5), kind(0.5)), (kind(0), kind(1), kind(0))])
    assert grid == Grid([Level(9, 0.5, 0.5), Level(0, 1, 0)]) and {type(v) for level in grid for v in level} == {float}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_levels_must_be_finite(bad, place):
    levels = [Level(900.0, 1.0, 9.0), Level(500.0, 1.0, 2.0), Level(0.0, 1.0, 0.0)]
    levels[place] = levels[place]._replace(sigma=bad)
    with pytest.raises(ValueError):
        Grid(levels)


@pytest.mark.parametrize("n", [5.0, "5", True, None, Fraction(5), np.float64(5)])
def test_what_only_looks_like_a_number_of_steps_is_refused(n):
    for make in (partial(preset, "sd-ddim"), partial(preset, "sd-euler-karras"), partial(preset, "lcm"), flow,
                 partial(spread, preset("sd-ddim", 9))):
        with pytest.raises(ValueError, match="steps"):
            make(n)


@pytest.mark.parametrize("name", ["sd-ddim", "sd-euler-karras", "sd-dpmpp", "lcm"])
def test_numbers_of_numpy_and_torch_are_numbers_of_steps(name):
    assert preset(name, np.int64(5)) == preset(name, torch.tensor(5)) == preset(name, 5)


@pytest.mark.parametrize("shift, said", [(0, "positive"), (-1, "positive"), ("3", "finite"), (math.nan, "finite")])
def test_a_shift_is_a_positive_number(shift, said):
    with pytest.raises(ValueError, match=f"shift is .*; it must be (a )?{said}"):
        flow(3, shift)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_steps_must_fit_the_schedule(spacing):
    for n in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"{n} sampling steps; a schedule of 1000 training steps allows 1 to 1000"):
            times(spacing, n, 1000)
    for n in (1, 2, 7, 999, 1000):
        found = times(spacing, n, 1000)
        assert len(found) == n and found == sorted(found, reverse=True) and 0 <= found[-1] <= found[0] <= 999


def test_an_offset_beyond_the_last_training_time_is_an_error():
    with pytest.raises(ValueError, match="1000 steps with steps_offset 1 would start at t = 1000, after the last"):
        times("leading", 1000, 1000, 1)
    with pytest.raises(ValueError, match="take fewer steps"):
        preset("sd-ddim", 1000)
    assert times("leading", 999, 1000, 1)[0] == 999


def test_karras_levels_are_equally_spaced_in_the_seventh_root():
    found = karras(6, 14.6, 0.03)
    roots = [u ** (1 / 7) for u in found]
    steps = [b - a for a, b in zip(roots, roots[1:])]
    assert (found[0], found[-1]) == pytest.approx((14.6, 0.03)) and steps == pytest.approx([steps[0]] * 5)


def test_an_unknown_spacing_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="timestep_spacing is 'even'; supported are leading, linspace and trailing"):
        times("even", 10, 1000)


def test_flow_runs_from_pure_noise_to_data_on_the_straight_line():
    levels = flow(10, shift=3.0)
    assert levels[0] == (1000.0, 0.0, 1.0) and levels[-1] == (0.0, 1.0, 0.0) and levels.n == 10
    assert all(a + s == pytest.approx(1) and t == pytest.approx(1000 * s) for t, a, s in levels)

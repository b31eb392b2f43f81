"""Samplers against published numbers and closed forms: orders, coordinates, statistics, gradients."""

import inspect
import math

import pytest
import torch

from minidiff import samplers
from minidiff.grid import Grid
from minidiff.prediction import Pred, denoiser, target
from minidiff.samplers import SAMPLERS
from minidiff.schedule import SD, Discrete, Level, amplitudes, zero_terminal_snr
from minidiff.sd import scheduler
from minidiff.sd.scheduler import from_diffusers, preset
from tests.exact import GAUSSIAN, TWO, Mixture, moved

pytestmark = pytest.mark.quick
LEADING = {"timestep_spacing": "leading"}
X = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)


def last(sampler, denoise, x, levels, **options):
    *_, step = sampler(denoise, x, levels, **options)
    return step.x


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def curved(x, t):
    """A net that is not linear in x and depends on t."""
    return torch.tanh(x + 0.3) * (0.6 + 0.4 * t / 1000) + 0.15 * x


# --- published trajectories

@pytest.mark.parametrize("sampler, name, more, kind, states, end", [
    ("ddim", "sd-ddim", {}, "eps", [1.241909, 1.490645, 1.725596, 1.925714], 1.866493),
    ("ddim", "sd-ddim", {}, "v", [0.953082, 0.892155, 0.819720, 0.740089], 0.315478),
    ("ddim", "sd-ddim", {"timestep_spacing": "trailing", "set_alpha_to_one": True}, "eps",
     [1.298812, 1.630119, 1.970875, 2.293199], 2.480543),
    ("ddpm", "sd-ddpm", {}, "eps", [2.209681, 2.077207, 0.637150, 0.926625], -0.113731),
    ("lms", "sd-lms", {}, "eps", [10.557692, 7.946513, 6.257673, 5.117169], 2.376632),
    ("euler", "sd-euler", LEADING, "eps", [6.496314, 5.208207, 4.316468, 3.672200], 1.836977),
    ("euler", "sd-euler", {}, "eps", [10.557692, 8.076764, 6.459887, 5.349402], 2.507928),
    ("euler", "sd-euler-karras", {}, "eps", [11.314050, 8.712596, 6.674779, 5.107383], 2.552878),
    ("euler", "sd-euler", LEADING, "v", [4.985484, 3.117126, 2.050478, 1.411298], 0.307671),
    ("euler_ancestral", "sd-euler", LEADING, "eps", [11.558640, 7.257609, 1.593791, 1.767009], -0.113731),
    ("heun", "sd-heun", {}, "eps", [9.984929, 7.336368], 2.152413),
    ("dpmpp_2m", "sd-dpmpp", {}, "eps", [1.298812, 1.589999, 1.879750, 2.150248], 2.245581),
    ("dpmpp_2m", "sd-dpmpp-karras", {}, "eps", [1.238498, 1.526877, 1.888982, 2.281970], 2.118527),
])
def test_worked_trajectory_is_the_published_one(sampler, name, more, kind, states, end):
    levels = from_diffusers({**scheduler.SD_CONFIG, **scheduler.PRESETS[name], **more}, 10, SD)
    noise = {"noise": draws()} if sampler in ("ddpm", "euler_ancestral") else {}
    steps = list(SAMPLERS[sampler](denoiser(lambda x, t: 0.5 * x + 0.1, kind), levels.start(torch.ones(1, 1, 1, 1)),
                                   levels, **noise))
    assert [step.x.item() for step in steps[1:len(states) + 1]] == pytest.approx(states, rel=3e-6)
    assert steps[-1].x.item() == pytest.approx(end, abs=5e-6)


# --- orders of convergence, with the exact denoiser

def fixed_range(n, coordinates):
    """sigma/alpha from 1 to 0.2: ends above 0, where every step has full order."""
    return Grid([moved(Level(0.0, 1.0, 0.2 ** (i / n)), coordinates) for i in range(n + 1)])


def order(sampler, data, coordinates, n=80, **options):
    errors = []
    for steps in (n, 2 * n):
        levels = fixed_range(steps, coordinates)
        x = X * math.hypot(levels[0].alpha, levels[0].sigma)
        errors.append((last(sampler, data.denoise, x, levels, **options)
                       - data.transport(x, levels[0], levels[-1])).abs().max())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("coordinates", ["VP", "VE", "flow"])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("name, expected", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2),
                                            ("unipc", 3)])
def test_order_of_convergence(name, expected, data, coordinates):
    options = {"lower_order_final": False} if name in ("dpmpp_2m", "unipc") else {}
    assert order(SAMPLERS[name], data, coordinates, **options) == pytest.approx(expected, abs=0.2)


# --- one process, many coordinates

def in_coordinates(name, coordinates, n=20, noise=None):
    """The end of one run of 20 steps, on the same sigma/alpha but in other coordinates."""
    vp = preset("sd-ddim", n)
    levels = Grid([moved(level, coordinates) for level in vp])
    x = X * math.hypot(levels[0].alpha, levels[0].sigma)
    options = {"noise": noise} if noise else {}
    return last(SAMPLERS[name], denoiser(curved, "eps"), x, levels, **options) / levels[-1].alpha


@pytest.mark.parametrize("name", ["ddim", "euler", "lms", "plms", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("coordinates", ["VE", "flow"])
def test_the_coordinates_do_not_matter(name, coordinates):
    vp = in_coordinates(name, "VP")
    torch.testing.assert_close(in_coordinates(name, coordinates), vp, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
@pytest.mark.parametrize("coordinates", ["VE", "flow"])
def test_the_coordinates_do_not_matter_with_equal_noise(name, coordinates):
    reference = "ddpm" if name == "euler_ancestral" else name
    torch.testing.assert_close(in_coordinates(name, coordinates, noise=draws()),
                               in_coordinates(reference, "VP", noise=draws()), rtol=1e-6, atol=1e-6)


def test_without_its_noise_the_sde_solver_is_the_ode_solver():
    levels = preset("sd-dpmpp", 20)
    ode, sde = (last(sampler, TWO.denoise, X, levels, **options) for sampler, options in (
        (samplers.dpmpp_2m, {}), (samplers.dpmpp_2m_sde, {"eta": 0.0, "noise": None})))
    assert torch.equal(ode, sde)
    half = order(samplers.dpmpp_sde, TWO, "VE", eta=0.0)
    assert half == pytest.approx(2, abs=0.2)


def test_churn_of_none_is_euler_and_churn_repairs_a_wrong_start():
    """Started at the wrong place, noise and denoising forget it: the mean comes nearer to the data's."""
    levels, noise = preset("sd-euler-karras", 40), draws()
    plain = last(samplers.euler, TWO.denoise, X, levels)
    assert torch.equal(plain, last(samplers.euler_churn, TWO.denoise, X, levels, churn=0.0, noise=None))
    start = torch.full((4000,), 8.0).double() + 14.6 * noise(torch.empty(4000).double())
    true = sum(w * m for w, m in zip(TWO.weights, TWO.means))
    ends = [last(samplers.euler_churn, TWO.denoise, start, levels, churn=churn, noise=noise).mean() - true
            for churn in (0.0, 16.0)]
    assert ends[0] > 0.2 and abs(ends[1]) < 0.5 * ends[0]


def test_heun_depends_on_the_coordinates():
    vp, ve = in_coordinates("heun", "VP"), in_coordinates("heun", "VE")
    assert 1e-3 < (vp - ve).abs().max() / vp.abs().max() < 0.1


def test_euler_equals_ddim_eta0():
    """And both are Euler's formula, x' = x + eps·(sigma' − sigma) at alpha = 1."""
    levels, x, denoise = preset("sd-euler", 20), X * 14.6, denoiser(curved, "eps")
    by_hand = x
    for now, nxt in zip(levels, levels[1:]):
        by_hand = by_hand + denoise(by_hand, now).eps * (nxt.sigma - now.sigma)
    torch.testing.assert_close(last(samplers.euler, denoise, x, levels), by_hand)
    torch.testing.assert_close(last(samplers.ddim, denoise, x, levels, eta=0.0), by_hand)


def test_ddpm_is_the_papers_posterior_and_ddim_eta1():
    """Ho et al. 2020, eq. 7: mean of q(x'|x, x0) and its variance, not beta."""
    levels, denoise, noise = preset("sd-ddpm", 20), denoiser(curved, "eps"), draws()
    x = X
    for (t, a, s), (_, a1, s1) in zip(levels, levels[1:]):
        x0 = denoise(x, Level(t, a, s)).x0
        keep = a * a / (a1 * a1)                                   # alpha_t of the paper, 1 − beta
        mean = a1 * (1 - keep) / s**2 * x0 + math.sqrt(keep) * s1**2 / s**2 * x
        x = mean + (math.sqrt(s1**2 / s**2 * (1 - keep)) * noise(x) if s1 else 0)
    torch.testing.assert_close(last(samplers.ddpm, denoise, X, levels, noise=draws()), x)
    torch.testing.assert_close(last(samplers.ddim, denoise, X, levels, eta=1.0, noise=draws()), x)


def test_euler_ancestral_goes_down_and_up_as_in_k_diffusion():
    levels, denoise, noise = preset("sd-euler", 20), denoiser(curved, "eps"), draws()
    x = X * 14.6
    for now, nxt in zip(levels, levels[1:]):
        s, s1 = now.sigma, nxt.sigma
        up = math.sqrt(s1**2 * (s**2 - s1**2) / s**2)
        x = x + denoise(x, now).eps * (math.sqrt(s1**2 - up**2) - s) + (up * noise(x) if up else 0)
    torch.testing.assert_close(last(samplers.euler_ancestral, denoise, X * 14.6, levels, noise=draws()), x)


# --- zero terminal SNR: alpha = 0 exactly at the start

ZERO = Discrete(zero_terminal_snr(SD.alpha_bar))


def zero_grid(n):
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return from_diffusers(config, n, ZERO)


def exact_v(x, t):
    level = Level(t, *ZERO(t))
    return target("v", *TWO.denoise(x, level), level.alpha, level.sigma)


@pytest.mark.parametrize("name, tolerance", [("ddim", 0.025), ("dpmpp_2m", 0.005), ("heun", 0.005),
                                             ("unipc", 0.008)])
def test_from_alpha_zero_v_prediction_ends_at_the_right_place(name, tolerance):
    levels = zero_grid(100)[:-1]  # without the step to sigma = 0, which is of order 1 for all
    assert levels[0].alpha == 0
    steps = list(SAMPLERS[name](denoiser(exact_v, "v"), X, levels))
    assert all(step.x.isfinite().all() for step in steps)
    assert (steps[-1].x - TWO.transport(X, levels[0], levels[-1])).abs().max() < tolerance


def test_at_alpha_zero_lms_plms_and_eps_prediction_are_errors():
    for name in ("lms", "plms", "dpmpp_sde"):
        with pytest.raises(ValueError, match="at zero terminal SNR|at alpha = 0"):
            last(SAMPLERS[name], denoiser(exact_v, "v"), X, zero_grid(10))
    for name in ("ddim", "dpmpp_2m", "heun", "unipc"):
        with pytest.raises(ValueError, match="use v-prediction at zero terminal SNR"):
            last(SAMPLERS[name], denoiser(exact_v, "eps"), X, zero_grid(10))


# --- samples have the distribution of the data

def whole_range(n, coordinates="VP"):
    """sigma/alpha from 15 to 0.01 in equal ratios, then 0."""
    levels = [moved(Level(0.0, 1.0, 15 * (0.01 / 15) ** (i / n)), coordinates) for i in range(n + 1)]
    return Grid([*levels, Level(0.0, 1.0, 0.0)])


@pytest.mark.parametrize("name, coordinates", [("ddpm", "VP"), ("euler_ancestral", "VE"), ("dpmpp_2m_sde", "flow"),
                                               ("dpmpp_sde", "VP")])
def test_ancestral_samples_have_the_mean_and_variance_of_the_data(name, coordinates):
    count, levels, noise = 10_000, whole_range(400, coordinates), draws()
    x = last(SAMPLERS[name], GAUSSIAN.denoise, levels.start(noise(torch.empty(count).double())), levels, noise=noise)
    assert abs(x.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(count)
    assert abs(x.var().item() - 0.25) < 4 * 0.25 * math.sqrt(2 / count)


def variance(sampler, levels, stds=(0.5,), **options):
    """Of what a sampler makes of unit noise, for data N(0, std²): exact, no samples needed.

    For such data every step is linear, so the state is a row of weights, one for the start and one for each draw of
    noise, and its variance is the sum of their squares.
    """
    data, units = Mixture((1.0,), (0.0,), stds), iter(torch.eye(1 + 3 * len(levels), dtype=torch.float64))
    x = last(sampler, data.denoise, levels.start(next(units)), levels, noise=lambda like: next(units), **options)
    return (x**2).sum().item()


@pytest.mark.parametrize("name, coordinates, expected", [
    ("ddpm", "VP", 1), ("euler_ancestral", "VE", 1), ("dpmpp_2m_sde", "VP", 2), ("dpmpp_2m_sde", "flow", 2),
    ("dpmpp_sde", "VE", 2), ("dpmpp_sde", "VP", 2)])
def test_order_of_convergence_of_the_variance(name, coordinates, expected):
    """What is left of the error when steps are halved, from the true distribution at sigma/alpha = 1 to 0.2."""
    options = {"lower_order_final": False} if name == "dpmpp_2m_sde" else {}

    def error(n):
        levels = fixed_range(n, coordinates)
        (_, a, s), (_, a1, s1) = levels[0], levels[-1]
        levels.start = lambda z: math.sqrt(0.25 * a * a + s * s) * z
        return variance(SAMPLERS[name], levels, **options) - (0.25 * a1 * a1 + s1 * s1)

    assert math.log2(abs(error(80) / error(160))) == pytest.approx(expected, abs=0.2)


def test_the_larger_variance_is_right_for_data_of_variance_one_and_the_smaller_for_none():
    """Ho et al. 2020, section 3.2: beta is the best variance for x0 of N(0, 1), the posterior's for a single x0."""
    levels = whole_range(50)
    assert variance(samplers.ddpm_large, levels, stds=(1.0,)) == pytest.approx(1.0, abs=1e-3)
    assert abs(variance(samplers.ddpm, levels, stds=(1.0,)) - 1) > 0.1
    assert variance(samplers.ddpm, levels, stds=(1e-9,)) == pytest.approx(0.0, abs=1e-9)
    near = levels[:-1]                                                           # noisy picture, not the last step
    assert variance(samplers.ddpm_large, near, stds=(1e-9,)) > 1.2 * near[-1].sigma ** 2
    assert variance(samplers.ddpm, near, stds=(1e-9,)) == pytest.approx(near[-1].sigma ** 2, rel=0.01)


def test_two_halves_of_a_mixture_get_their_share():
    count, levels, noise = 20_000, preset("sd-ddpm", 100), draws()
    x = last(samplers.ddpm, TWO.denoise, noise(torch.empty(count).double()), levels, noise=noise)
    expected = TWO.cdf(torch.tensor(0.25).double(), levels[-1]).item()  # the valley between the two
    assert (x < 0.25).double().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(0.25 * 0.75 / count))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_slice_carries_a_noised_picture_home(name):
    """img2img: with all data at 2, alpha·2 + sigma·z put on any level ends at 2."""
    vp = {"lcm": "lcm", "ddpm_large": "sd-ddpm",
          **dict.fromkeys(("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms"), "sd-ddim")}
    levels = preset(vp.get(name, "sd-euler"), 20)[12:]
    steps = list(SAMPLERS[name](lambda x, level: Pred(0 * x + 2, (x - level.alpha * 2) / level.sigma),
                                levels[0].alpha * 2 + levels[0].sigma * X, levels))
    end = levels[-1]
    assert len(steps) == 9 and [step.level for step in steps] == list(levels)
    assert (steps[-1].x - end.alpha * 2).abs().max() <= 6 * end.sigma + 2e-6


# --- generators, purity, gradients

@pytest.mark.parametrize("name, calls", [("ddim", 6), ("ddpm", 6), ("euler", 6), ("euler_ancestral", 6), ("heun", 11),
                                         ("lms", 6), ("plms", 7), ("dpmpp_2m", 6), ("unipc", 6), ("lcm", 6),
                                         ("ddpm_large", 6), ("dpmpp_2m_sde", 6), ("dpmpp_sde", 11)])
def test_a_sampler_is_lazy_and_yields_n_plus_one_steps(name, calls):
    asked = []

    def denoise(x, level):
        asked.append(level)
        return TWO.denoise(x, level)

    levels = preset("sd-euler", 6)
    steps = SAMPLERS[name](denoise, X, levels)
    level, x, x0 = next(steps)
    assert level is levels[0] and x is X and x0 is None and asked == []
    next(steps)
    assert all(level.t >= levels[1].t for level in asked)
    assert [step.level for step in steps] == list(levels[2:]) and len(asked) == calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_state_is_changed_afterwards(name):
    start, kept = X.clone(), []
    for step in SAMPLERS[name](TWO.denoise, start, preset("sd-euler", 6)):
        kept.append((step.x, step.x.clone()))
    assert torch.equal(start, X) and all(torch.equal(x, copy) for x, copy in kept)


def test_noise_is_drawn_only_where_some_is_added():
    drawn = []

    def noise(like):
        drawn.append(like)
        return torch.zeros_like(like)

    levels = preset("sd-ddpm", 6)
    last(samplers.ddim, TWO.denoise, X, levels, noise=noise)
    assert drawn == []
    last(samplers.ddpm, TWO.denoise, X, levels, noise=noise)
    assert len(drawn) == 5  # none on the last step


@pytest.mark.parametrize("name", ["ddim", "heun", "lms", "plms", "dpmpp_2m", "unipc"])
def test_gradients_flow_through_the_sampler(name):
    x = X.clone().requires_grad_()
    levels = preset("sd-ddim", 4)
    assert torch.autograd.gradcheck(lambda x: last(SAMPLERS[name], denoiser(curved, "v"), x, levels), x)


RATIOS = [10.0 * (0.1 / 10) ** (i / 8) for i in range(9)]


@pytest.mark.parametrize("name", [*SAMPLERS, "consistency"])
@pytest.mark.parametrize("places", [[i] for i in range(9)] + [[0, 0], [3, 3, 4], [7, 8]], ids=str)
def test_a_level_that_a_grid_holds_twice_is_a_step_of_no_size(name, places):
    """Whether it is the same level, or the same one in other coordinates, but for rounding."""
    sampler = getattr(samplers, name)
    options = {"noise": torch.zeros_like} if "noise" in inspect.signature(sampler).parameters else {}

    def walk(copies):
        levels = []
        for i, u in enumerate(RATIOS):
            other = amplitudes(u) if name == "heun" else (1.0, u)  # heun's steps depend on the coordinates
            levels += [Level(8.0 - i, *amplitudes(u)), *[Level(8.0 - i, *other)] * copies.count(i)]
        return [step.x / step.level.alpha for step in sampler(TWO.denoise, X, Grid(levels), **options)]

    once, twice = walk([]), walk(places)
    assert len(twice) == len(once) + len(places)
    if name in ("lcm", "consistency"):
        assert twice[-1].isfinite().all()  # each of their steps goes to the end and back, at the same level too
    else:  # unipc corrects a state before it asks about it again, and the last step is of order 1 in dpmpp_2m
        near = 0.05 if name == "unipc" or "dpmpp_2m" in name and 8 in places else 1e-6
        assert (twice[-1] - once[-1]).abs().max() < near

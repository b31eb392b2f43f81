"""Every sampler on its grid equals diffusers' scheduler, on a fixed nonlinear toy net: no weights, no download."""
import importlib
import sys
import types

import diffusers
import pytest
import torch

from minidiff import grid, samplers
from minidiff.prediction import consistent, denoiser, target
from minidiff.schedule import SD
from minidiff.sd.scheduler import CLASSES, discrete, from_config, from_diffusers, preset
from tests.exact import TWO

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
KINDS = {"eps": "epsilon", "v": "v_prediction"}
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CASES = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler",
     {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "midpoint"}),
    ("UniPCMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
]
PNDM = {"skip_prk_steps": True, "steps_offset": 1}
# what checkpoints' configs say that not every class understands
OPTIONS = [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True},
    {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "interpolation_type": "linear"},
    {"original_inference_steps": 40, "timestep_scaling": 5.0, "skip_prk_steps": True, "solver_type": "heun"},
    {"use_lu_lambdas": False, "sigma_min": None, "set_alpha_to_one": True, "timestep_spacing": "linspace"},
]


def reference_class(name):
    """diffusers' class; DPMSolverSDEScheduler without torchsde, whose Brownian paths a test replaces by its own."""
    if name == "DPMSolverSDEScheduler":
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    return getattr(diffusers, name)


def net(x, t):
    """Nonlinear in x, mixes neighbours, depends on t."""
    t = float(t)
    return torch.tanh(0.7 * x.roll(1, -1) + 0.3 * x.roll(1, -2)) * (0.6 + 0.4 * t / 1000) + 0.15 * x


def theirs(name, config, n, eta=0.0, seed=1):
    """All states of diffusers' own loop."""
    scheduler = getattr(diffusers, name).from_config({**BASE, **config})
    scheduler.set_timesteps(n)
    x, xs = Z * scheduler.init_noise_sigma, []
    drawing = name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
    options = {"generator": torch.Generator().manual_seed(seed)} if drawing else {}
    options |= {"eta": eta, "generator": torch.Generator().manual_seed(seed)} if eta else {}
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **options).prev_sample
        xs.append(x)
    return xs


def ours(name, config, n, kind, seed=1, **options):
    config = {**BASE, **config, "_class_name": name}
    schedule = discrete(config)
    sampler, found = from_config(config)
    levels = from_diffusers(config, n, schedule)
    generator = torch.Generator().manual_seed(seed)
    if sampler in (samplers.ddpm, samplers.euler_ancestral, samplers.lcm) or options:
        options["noise"] = lambda like: torch.randn(like.shape, generator=generator)
    steps = sampler(denoiser(net, kind), levels.start(Z), levels, **found, **options)
    return [step.x for step in steps][1:]


def assert_same(mine, reference, tolerance=1e-5):
    assert (mine - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("n", [4, 10, 20, 50])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, config", CASES)
def test_sampler_equals_diffusers(name, config, kind, n):
    config = {**config, "prediction_type": KINDS[kind]}
    mine, reference = ours(name, config, n, kind), theirs(name, config, n)
    assert_same(mine[-1], reference[-1])
    if "Heun" not in name:
        assert len(mine) == len(reference) == n
        for x, y in zip(mine, reference):
            assert_same(x, y)


def visited(scheduler, n):
    """diffusers' times and, where it has them, noise-to-signal ratios; some list twice what is visited once."""
    scheduler.set_timesteps(n)
    twice = {"HeunDiscreteScheduler": (slice(1, None, 2), slice(1, None, 2)), "PNDMScheduler": (slice(2, None),) * 2,
             "DPMSolverSDEScheduler": (slice(2, None, 2), slice(1, None, 2))}
    every = twice.get(type(scheduler).__name__, (slice(1, None),) * 2)
    rows = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    return [[*row[:1].tolist(), *row[part].tolist()] for row, part in zip(rows, every) if row is not None]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_on_anothers_config_takes_only_the_options_it_knows(name, options):
    options = {**options, "skip_prk_steps": True}
    reference = visited(reference_class(name).from_config({**BASE, **options}), 20)
    if name in ("DDIMScheduler", "PNDMScheduler", "LCMScheduler"):  # they keep alpha_bar
        reference = reference[:1]
    levels = from_diffusers({**BASE, **options, "_class_name": name}, 20, SD)
    mine = [[level.t for level in levels[:-1]], [level.sigma / level.alpha for level in levels]]
    for found, row in zip(mine, reference):
        assert found == pytest.approx(row, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_times_equal_diffusers_for_every_number_of_steps(name, spacing):
    config = {**BASE, "timestep_spacing": spacing, "_class_name": name}
    scheduler = getattr(diffusers, name).from_config(config)
    for n in (*range(1, 103), 250, 333, 999):
        if not (spacing == "trailing" and n == 61):  # test_trailing_has_exactly_n_times
            levels = from_diffusers(config, n, SD)
            assert [level.t for level in levels[:-1]] == pytest.approx(visited(scheduler, n)[0], abs=1e-3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_one_step_equals_diffusers(name):
    config = {"timestep_spacing": "trailing", "clip_sample": False}
    assert_same(ours(name, config, 1, "eps")[-1], theirs(name, config, 1)[-1])


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_ddim_with_eta_equals_diffusers(eta):
    config = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    assert_same(ours("DDIMScheduler", config, 20, "eps", eta=eta)[-1], theirs("DDIMScheduler", config, 20, eta=eta)[-1])


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_with_v_equals_diffusers(name):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction",
              "clip_sample": False}
    assert_same(ours(name, config, 20, "v")[-1], theirs(name, config, 20)[-1])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 20, 50])
@pytest.mark.parametrize("more", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "leading", "steps_offset": 0}])
def test_plms_equals_diffusers(n, more):
    config = {**PNDM, **more}
    mine, reference = ours("PNDMScheduler", config, n, "eps"), theirs("PNDMScheduler", config, n)
    assert_same(mine[-1], reference[-1])
    assert len(reference) == n + (n > 1)  # the second entry stands twice


@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("more", [{}, {"set_alpha_to_one": False, "steps_offset": 1, "timestep_scaling": 3.0},
                                  {"original_inference_steps": 100, "prediction_type": "v_prediction"}])
def test_lcm_equals_diffusers(n, more):
    kind = "v" if "prediction_type" in more else "eps"
    mine = ours("LCMScheduler", more, n, kind)
    reference = theirs("LCMScheduler", more, n)
    for x, y in zip(mine, reference, strict=True):
        assert_same(x, y)


def test_lcm_times_and_defaults_equal_diffusers():
    scheduler = diffusers.LCMScheduler()
    schedule = discrete({"_class_name": "LCMScheduler"})
    torch.testing.assert_close(schedule.alpha_bar, scheduler.alphas_cumprod)
    for n in range(1, 51):
        levels = from_diffusers({"_class_name": "LCMScheduler"}, n, schedule)
        assert [level.t for level in levels[:-1]] == visited(scheduler, n)[0]
    with pytest.raises(ValueError, match="distilled for 50 steps allows 1 to 50"):
        preset("lcm", 51)


def test_consistency_equals_diffusers():
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(1)
    sigmas = [u.item() for u in scheduler.sigmas]
    x = Z * sigmas[0]
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample

    # the reference's list ends at sigma = 0, for which it takes sigma_min
    levels = grid.Grid([grid.Level(scheduler.sigma_to_t(u) if u else 0.0, 1.0, max(u, scheduler.config.sigma_min))
                        for u in sigmas])
    noise = torch.Generator().manual_seed(1)
    ends = consistent(net, scheduler.config.sigma_min)
    *_, last = samplers.consistency(ends, Z * sigmas[0], levels,
                                    noise=lambda like: torch.randn(like.shape, generator=noise))
    assert_same(last.x, x, 1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [4, 20])
def test_flow_grid_equals_diffusers(n, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    x = Z
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    levels = grid.flow(n, shift)
    *_, last = samplers.euler(denoiser(net, "flow"), levels.start(Z), levels)
    assert_same(last.x, x)


# where diffusers contradicts itself, we follow the mathematics (NOTE: in minidiff.grid, samplers and guidance)

def test_trailing_has_exactly_n_times():
    scheduler = diffusers.DDIMScheduler(**BASE, timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
    assert [len(grid.times("trailing", n, 1000)) for n in range(1, 1001)] == list(range(1, 1001))
    assert all(min(grid.times("trailing", n, 1000)) >= 0 for n in range(1, 1001))


def test_ddim_steps_land_where_the_next_one_starts():
    """diffusers' DDIM jumps to t − T//n, not to the next entry of its list: linspace, n = 50."""
    config = {"clip_sample": False, "timestep_spacing": "linspace"}
    scheduler = diffusers.DDIMScheduler(**BASE, **config)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps
    assert int((t[:-1] - 1000 // 50 != t[1:]).sum()) == 19
    # with the exact denoiser of one point, every step that knows where it stands keeps x = alpha·x0 + sigma·eps
    levels = from_diffusers({**BASE, **config, "_class_name": "DDIMScheduler"}, 50, SD)
    assert [level.t for level in levels[:-1]] == t.tolist()
    x, eps = 3.0, Z
    for step in samplers.ddim(lambda x, level: (torch.tensor(3.0), (x - level.alpha * 3.0) / level.sigma),
                              levels[0].alpha * x + levels[0].sigma * eps, levels):
        torch.testing.assert_close(step.x, step.level.alpha * 3.0 + step.level.sigma * eps)
    assert (theirs("DDIMScheduler", config, 50)[-1] - ours("DDIMScheduler", config, 50, "eps")[-1]).abs().max() > 1e-3


def test_clip_rederives_eps():
    """diffusers' DDIM clips x0 and keeps the eps from before, unless told use_clipped_model_output; we never do."""
    from minidiff import guidance

    scheduler = diffusers.DDIMScheduler(**BASE, clip_sample=True, set_alpha_to_one=False, steps_offset=1)
    results = []
    for use in (False, True):
        scheduler.set_timesteps(10)
        x = Z
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x, use_clipped_model_output=use).prev_sample
        results.append(x)
    levels = preset("sd-ddim", 10)
    *_, last = samplers.ddim(guidance.clip(denoiser(net, "eps")), Z, levels)
    assert_same(last.x, results[1])
    assert (last.x - results[0]).abs().max() > 1e-2


def test_a_slice_starts_lms_with_one_derivative():
    """diffusers cuts the list of times for img2img but not the order: its first step there has fourth-order weights."""
    levels = preset("sd-lms", 20)[8:]
    x = levels[0].sigma * Z
    states = [step.x for step in samplers.lms(denoiser(net, "eps"), x, levels)]
    *_, one = samplers.euler(denoiser(net, "eps"), x, levels[:2])
    assert torch.equal(states[1], one.x) or (states[1] - one.x).abs().max() < 1e-5
    scheduler = diffusers.LMSDiscreteScheduler(**BASE)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    t = scheduler.timesteps[8]
    wrong = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert (wrong - states[1]).abs().max() > 1e-2 * states[1].abs().max()


def plms_errors(n, begin, kind):
    """How far PLMS, ours and diffusers', ends from the exact solution for a mixture, from entry `begin` of n steps."""
    config = {**BASE, **PNDM, "prediction_type": KINDS[kind], "_class_name": "PNDMScheduler"}
    levels = from_diffusers(config, n, SD)[begin:]

    def exact(x, t):
        level = grid.Level(float(t), *SD(float(t)))
        return target(kind, *TWO.denoise(x, level), level.alpha, level.sigma)

    start = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
    *_, last = samplers.plms(denoiser(exact, kind), start, levels)
    scheduler = diffusers.PNDMScheduler.from_config(config)
    scheduler.set_timesteps(n)
    x = start
    for t in scheduler.timesteps[begin + (begin > 0):]:
        x = scheduler.step(exact(x, t), t, x).prev_sample
    truth = TWO.transport(start, levels[0], levels[-1])
    return (last.x - truth).abs().max(), (x - truth).abs().max()


def test_a_slice_starts_plms_with_two_calls():
    """diffusers cuts the entry that stands twice off its list for img2img, and takes the rest for what it is not."""
    mine, theirs = plms_errors(80, 30, "eps")
    assert mine < 0.1 * theirs


def test_plms_averages_eps_whatever_the_kind():
    """diffusers averages raw v of different levels before it makes eps of them: an error of order 1 in the step."""
    (mine, theirs), (mine_half, theirs_half) = plms_errors(40, 0, "v"), plms_errors(80, 0, "v")
    assert mine < 0.2 * theirs and mine_half < 0.2 * mine and 0.4 * theirs < theirs_half < 0.6 * theirs


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_lms_and_heun_know_zero_terminal_snr(name):
    """diffusers' two classes drop `rescale_betas_zero_snr`, and feed the net states less noisy than t says."""
    config = {**BASE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "_class_name": name}
    trained = discrete(config)
    levels = from_diffusers(config, 10, trained)
    for t, alpha, sigma in levels[1:-1]:
        a, s = trained(t)
        assert sigma / alpha == pytest.approx(s / a, rel=1e-6)
    theirs = visited(getattr(diffusers, name).from_config(config), 10)[1]
    assert levels[1].sigma > 2 * theirs[1]


def test_dpmpp_on_a_slice_counts_the_steps_it_takes_from_the_full_grid():
    """20 steps cut to 10: the last one stays of order 2, as in the full run; by its length alone it would be of 1."""
    config = {**BASE, "_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}
    part = from_diffusers(config, 20, SD)[10:]
    *_, last = samplers.dpmpp_2m(denoiser(net, "eps"), Z, part)
    *_, full = samplers.dpmpp_2m(denoiser(net, "eps"), Z, part, lower_order_final=False)
    *_, short = samplers.dpmpp_2m(denoiser(net, "eps"), Z, grid.Grid(part))
    assert torch.equal(last.x, full.x) and (last.x - short.x).abs().max() > 1e-5

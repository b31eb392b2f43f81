"""Schedules: the published numbers of Stable Diffusion, the definitions, and what a scheduler_config.json means."""

import math
import re

import pytest
import torch

from minidiff import grid, samplers
from minidiff.schedule import (
    EDM,
    SD,
    Discrete,
    Flow,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)

pytestmark = pytest.mark.quick


def test_stable_diffusion_has_the_published_numbers():
    betas = scaled_linear_betas()
    assert betas[[0, 1, 999]].tolist() == pytest.approx([0.00085, 0.000854699, 0.012], rel=1e-6)
    assert SD.T == 1000
    assert SD.alpha_bar[[0, 500, 999]].tolist() == pytest.approx([0.99914998, 0.27633247, 0.0046600951], rel=2e-6)
    found = [SD.nsr[t] for t in (0, 1, 500, 999)]
    assert found == pytest.approx([0.029167535, 0.041314479, 1.6182797, 14.614647], rel=2e-6)


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first():
    alpha_bar = zero_terminal_snr(SD.alpha_bar)
    assert alpha_bar[-1] == 0 and alpha_bar[0].item() == pytest.approx(0.99914998, rel=1e-6)
    assert alpha_bar[500].item() == pytest.approx(0.24101864, rel=2e-6)
    assert Discrete(alpha_bar)(999) == (0.0, 1.0) and Discrete(alpha_bar).nsr[-1] == math.inf


def test_alpha_and_sigma_are_amplitudes_not_variances():
    alpha, sigma = SD(500)
    assert alpha**2 == pytest.approx(0.27633247, rel=2e-6) and alpha**2 + sigma**2 == pytest.approx(1, abs=1e-12)


def test_numbers_and_tensors_of_times_agree():
    alpha, sigma = SD(torch.tensor([[0, 7], [500, 999]]))
    assert alpha.dtype == torch.float32 and alpha.shape == sigma.shape == (2, 2)
    for at, t in (((0, 0), 0), ((0, 1), 7), ((1, 0), 500), ((1, 1), 999.0)):
        assert SD(t) == pytest.approx((alpha[at].item(), sigma[at].item()), rel=1e-5)


def test_between_two_times_the_noise_to_signal_ratio_is_linear():
    alpha, sigma = SD(10.25)
    assert sigma / alpha == pytest.approx(0.75 * SD.nsr[10] + 0.25 * SD.nsr[11], rel=1e-12)
    assert math.hypot(alpha, sigma) == pytest.approx(1)


def test_cosine_betas_follow_the_paper_and_are_capped():
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = cosine_betas(100)
    assert betas[-1].item() == pytest.approx(0.999) and betas.max() == betas[-1]
    alpha_bar = (1 - betas.double()).cumprod(0)
    assert alpha_bar[:99].tolist() == pytest.approx([f((i + 1) / 100) / f(0) for i in range(99)], rel=1e-4)


def test_linear_and_sigmoid_betas_run_between_their_ends():
    assert linear_betas(5, 0.1, 0.5).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    s = [1 / (1 + math.exp(-u)) for u in (-6, 0, 6)]
    assert sigmoid_betas(3, 0.1, 0.5).tolist() == pytest.approx([0.1 + 0.4 * u for u in s])


@pytest.mark.parametrize("config, betas", [
    ({}, linear_betas()),
    ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, scaled_linear_betas()),
    ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, cosine_betas(50)),
    ({"trained_betas": [0.1, 0.2, 0.3]}, torch.tensor([0.1, 0.2, 0.3])),
    ({"_class_name": "HeunDiscreteScheduler"}, linear_betas(1000, 0.00085, 0.012)),  # that class's own defaults
])
def test_from_config_reads_the_betas_and_the_defaults(config, betas):
    torch.testing.assert_close(Discrete.from_config(config).alpha_bar, (1 - betas).cumprod(0))
    rescaled = Discrete.from_config({**config, "rescale_betas_zero_snr": True})
    assert rescaled.alpha_bar[-1] == 0 and rescaled.T == len(betas)


def test_unknown_beta_schedule_is_named():
    with pytest.raises(ValueError, match="beta_schedule is 'magic'; supported are linear, scaled_linear, sigmoid"):
        Discrete.from_config({"beta_schedule": "magic"})


@pytest.mark.parametrize("row", [[0.5, 0.6], [0.5, 0.5], [1.0, 0.5], [0.5, -0.1], [0.5, math.nan], [[0.5, 0.4]]])
def test_a_table_must_fall_within_zero_and_one(row):
    with pytest.raises(ValueError, match="falling numbers in"):
        Discrete(torch.tensor(row))


def test_a_time_after_the_last_is_an_error():
    for t in (1000, -1, 999.5):
        with pytest.raises(ValueError, match="this schedule has the times 0 to 999"):
            SD(t)


def test_flow_is_a_straight_line_and_shift_three_moves_the_middle():
    assert [Flow()(t) for t in (0, 250, 1000)] == [(1, 0), (0.75, 0.25), (0, 1)]
    assert Flow(3.0)(500) == (0.25, 0.75) and Flow(3.0)(1000) == (0, 1)
    alpha, sigma = Flow()(torch.tensor([0.0, 250.0]))
    assert alpha.tolist() == [1.0, 0.75] and sigma.tolist() == [0.0, 0.25]


def test_edm_has_alpha_one_and_t_a_quarter_of_log_sigma():
    assert EDM()(math.log(80) / 4) == pytest.approx((1, 80))
    alpha, sigma = EDM()(torch.tensor([math.log(2) / 4]))
    torch.testing.assert_close((alpha, sigma), (torch.tensor([1.0]), torch.tensor([2.0])))


@pytest.mark.parametrize("config", [
    {"num_train_timesteps": "1000"}, {"num_train_timesteps": 0}, {"num_train_timesteps": 9.5},
    {"num_train_timesteps": [9]}, {"num_train_timesteps": True},
    {"beta_start": "0.00085"}, {"beta_end": 0}, {"beta_end": math.nan},
    {"beta_schedule": ["linear"]}, {"trained_betas": 0.1}, {"trained_betas": ["0.1", "0.2"]}, {"trained_betas": []},
    {"prediction_type": 3}, {"rescale_betas_zero_snr": "false"}, {"steps_offset": -1}, {"clip_sample_range": "1"},
    {"timestep_spacing": ["leading"]}, {"set_alpha_to_one": "no"}, {"original_inference_steps": 0}])
def test_a_value_that_is_none_is_named_by_all_who_read_it(config):
    (key, value), = config.items()
    message = re.escape(f"the scheduler's config has {key} = {value!r}; it should be ")
    config = {"_class_name": "DDIMScheduler", **config}
    for read in (Discrete.from_config, samplers.from_config, samplers.clip_range,
                 lambda config: grid.from_diffusers(config, 5, SD)):
        with pytest.raises(ValueError, match=message):
            read(config)


def test_null_and_whole_floats_mean_what_is_meant():
    plain = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100}
    odd = {**plain, "num_train_timesteps": 100.0, "beta_start": None, "beta_schedule": None, "steps_offset": None,
           "prediction_type": None, "trained_betas": None, "clip_sample_range": None, "timestep_spacing": None}
    assert torch.equal(Discrete.from_config(odd).alpha_bar, Discrete.from_config(plain).alpha_bar)
    assert grid.from_diffusers(odd, 5, Discrete.from_config(odd)) == grid.from_diffusers(
        plain, 5, Discrete.from_config(plain))
    assert samplers.clip_range(odd) == samplers.clip_range(plain) == 1.0
    with pytest.raises(ValueError, match="has 3 trained_betas, but num_train_timesteps is 100"):
        Discrete.from_config({**plain, "trained_betas": [0.1, 0.2, 0.3]})
    assert Discrete.from_config({"trained_betas": [0.1, 0.5]}).alpha_bar.tolist() == pytest.approx([0.9, 0.45])


@pytest.mark.parametrize("name, change", [
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}),
    ("DPMSolverMultistepScheduler", {"use_dynamic_shifting": True}),
    ("UniPCMultistepScheduler", {"shift_terminal": 0.02}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "one"})])
def test_an_option_that_would_change_the_picture_is_not_dropped(name, change):
    (key, value), = change.items()
    with pytest.raises(ValueError, match=f"{key}.*{re.escape(repr(value))} is not supported"):
        config = {"_class_name": name, **change}
        samplers.from_config(config), grid.from_diffusers(config, 5, SD)


@pytest.mark.parametrize("change, message", [
    ({"beta_end": 5.0}, "beta_end = 5.0; it should be a number above 0, at most 1"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name = .*; it should be a text")])
def test_what_a_scheduler_config_cannot_say_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Discrete.from_config({"beta_schedule": "linear", **change})

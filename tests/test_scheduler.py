"""The table of diffusers' schedulers: what a config means, and which classes, options and values are refused."""

import math
import re

import pytest
import torch

from minidiff.samplers import SAMPLERS
from minidiff.schedule import SD, cosine_betas, linear_betas, scaled_linear_betas
from minidiff.sd import scheduler
from minidiff.sd.scheduler import from_diffusers, preset

pytestmark = pytest.mark.quick
DDIM, DDPM, EULER, HEUN = "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"
ANCESTRAL, LMS, DPM = "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler"
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
LINSPACE, KARRAS = {"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}


@pytest.mark.parametrize("key, value", [("thresholding", True), ("variance_type", "learned"),
                                        ("algorithm_type", "sde-dpmsolver"), ("solver_order", 3),
                                        ("solver_type", "heun"), ("solver_type", "bh1"), ("euler_at_final", True),
                                        ("timestep_type", "continuous"), ("skip_prk_steps", False),
                                        ("predict_x0", False), ("disable_corrector", [0])])
def test_from_config_refuses_an_unsupported_option_by_name_where_the_class_has_it(key, value):
    refused = 0
    for name, row in scheduler.CLASSES.items():
        config = {"skip_prk_steps": True, "_class_name": name, key: value}
        if value not in row.accepts.get(key, (value,)):
            refused += 1
            with pytest.raises(ValueError, match=re.escape(f"{name} with {key} = {value!r} is not supported")):
                scheduler.from_config(config)
            assert key == "skip_prk_steps" or scheduler.from_config({**config, key: None})[0] is row.sampler
        else:  # another class's option, left over in a checkpoint's config
            assert scheduler.from_config(config)[0] is row.sampler
    assert refused


def test_from_config_names_the_supported_classes():
    for name, sampler in SAMPLERS.items():
        config = {**scheduler.NAMES[name], "skip_prk_steps": True}
        assert scheduler.from_config(config)[0] is sampler
    with pytest.raises(ValueError, match="scheduler 'DEISMultistepScheduler' is not supported; supported are DDIM"):
        scheduler.from_config({"_class_name": "DEISMultistepScheduler"})
    for name in ("dpmpp_2m", "unipc"):
        config = {**scheduler.NAMES[name], "lower_order_final": False}
        assert scheduler.from_config(config) == (SAMPLERS[name], {"lower_order_final": False})
    assert scheduler.from_config({"_class_name": "LCMScheduler", "timestep_scaling": 5})[1] == {"scaling": 5}


@pytest.mark.parametrize("theirs, ours", [
    ("Euler", "euler"), ("Euler a", "euler_ancestral"), ("LMS", "lms"), ("LMS Karras", "lms_karras"), ("Heun", "heun"),
    ("DPM++ 2M", "dpmpp_2m"), ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("DPM++ SDE", "dpmpp_sde"),
    ("DPM++ SDE Karras", "dpmpp_sde_karras"), ("DPM++ 2M SDE", "dpmpp_2m_sde"), ("DDIM", "ddim"), ("PLMS", "plms"),
    ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"), ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde_exponential"),
    ("UniPC", "unipc"), ("LCM", "lcm"), ("dpm++_2m", "dpmpp_2m"), ("  euler  A ", "euler_ancestral")])
def test_a_sampler_goes_by_the_web_uis_name_too(theirs, ours):
    assert scheduler.named(theirs) == scheduler.named(ours)
    sampler, spacing = (ours.rpartition("_")[::2] if ours.rpartition("_")[2] in scheduler.SPACINGS else (ours, None))
    config = {"skip_prk_steps": True, **scheduler.named(theirs)}
    assert scheduler.from_config(config)[0] is SAMPLERS[sampler]
    assert [key for key in scheduler.SIGMAS if config.get(key)] == [f"use_{spacing}_sigmas"] * bool(spacing)


def test_a_name_decides_the_spacing_against_the_checkpoint():
    config = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    levels = [from_diffusers({**config, **scheduler.named(name)}, 8, SD)[4].sigma
              for name in ("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_beta")]
    assert levels[0] == levels[1] != levels[2]
    assert scheduler.from_config({**config, **scheduler.named("dpmpp_2m")})[0] is SAMPLERS["dpmpp_2m"]
    with pytest.raises(ValueError, match="asked for the spacings karras and beta; there can be one"):
        from_diffusers({"_class_name": EULER, **KARRAS, "use_beta_sigmas": True}, 8, SD)


@pytest.mark.parametrize("name, message", [
    ("ddim_karras", "ddim has no karras spacing; euler, heun, lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc do"),
    ("Euler a Karras", "euler_ancestral has no karras spacing"), ("karras", "unknown sampler 'karras'; there are ddim"),
    ("DPM++ 3M SDE", "unknown sampler 'DPM++ 3M SDE'; .* may end in _karras, _exponential, _beta")])
def test_a_name_that_means_nothing_is_told_what_does(name, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        scheduler.named(name)


def test_pndm_without_a_word_means_runge_kutta_steps_which_we_do_not_have():
    with pytest.raises(ValueError, match="PNDMScheduler with skip_prk_steps = False is not supported"):
        scheduler.from_config({"_class_name": "PNDMScheduler"})


@pytest.mark.parametrize("name, unsaid", [("DDIMScheduler", 1.0), ("DDPMScheduler", 1.0), ("LCMScheduler", None),
                                          ("HeunDiscreteScheduler", None), ("EulerDiscreteScheduler", None)])
def test_where_x0_is_clipped_depends_on_the_class(name, unsaid):
    assert scheduler.clip_range({"_class_name": name}) == unsaid
    assert scheduler.clip_range({"_class_name": name, "clip_sample": False}) is None
    known = name != "EulerDiscreteScheduler"
    assert scheduler.clip_range({"_class_name": name, "clip_sample": True, "clip_sample_range": 2.0}) == \
        (2.0 if known else None)


@pytest.mark.parametrize("name", scheduler.PRESETS)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_every_preset_has_n_steps_down_to_little_noise(name, n):
    levels = preset(name, n)
    assert len(levels) == n + 1 and levels.n == n and levels[-1].sigma <= 0.0292


def test_what_is_unknown_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="unknown grid 'sd-magic'; there are sd-ddim, sd-ddpm, sd-euler"):
        preset("sd-magic", 10)
    with pytest.raises(ValueError, match="scheduler 'KDPM2DiscreteScheduler' is not supported; supported are DDIM"):
        from_diffusers({"_class_name": "KDPM2DiscreteScheduler"}, 10, SD)
    with pytest.raises(ValueError, match="interpolation_type 'log_linear' is not supported; supported is linear"):
        from_diffusers({"_class_name": EULER, "interpolation_type": "log_linear"}, 10, SD)


@pytest.mark.parametrize("key", scheduler.REFUSED)
def test_an_option_that_would_change_the_levels_is_refused_by_name(key):
    for name, row in scheduler.CLASSES.items():
        plain = from_diffusers({"_class_name": name}, 10, SD)
        assert from_diffusers({"_class_name": name, key: None}, 10, SD) == plain
        if key in row.reads:
            with pytest.raises(ValueError, match=f"{name} with {key} is not supported"):
                from_diffusers({"_class_name": name, key: True}, 10, SD)
        else:  # another class's option, left over in a checkpoint's config
            assert from_diffusers({"_class_name": name, key: True}, 10, SD) == plain


@pytest.mark.parametrize("name", [ANCESTRAL, DDIM, DDPM])
def test_options_of_other_classes_do_not_move_the_levels(name):
    left_over = {**KARRAS, "final_sigmas_type": "sigma_min", "interpolation_type": "log_linear"}
    assert from_diffusers({"_class_name": name, **left_over}, 10, SD) == from_diffusers({"_class_name": name}, 10, SD)


@pytest.mark.parametrize("name", [EULER, DPM])
def test_karras_levels_may_end_on_the_lowest_of_the_table(name):
    levels = from_diffusers({"_class_name": name, **KARRAS, "final_sigmas_type": "sigma_min"}, 10, SD)
    assert levels[-2].sigma / levels[-2].alpha == pytest.approx(SD.nsr[0], rel=1e-12) and levels[-1] == levels[-2]


def test_dpmpp_needs_one_time_more_than_steps():
    assert from_diffusers({"_class_name": DPM}, 999, SD).n == 999
    for n in (0, 1000):
        with pytest.raises(ValueError, match=f"{n} sampling steps; .* allows 1 to 999"):
            from_diffusers({"_class_name": DPM}, n, SD)


@pytest.mark.parametrize("config, betas", [
    ({}, linear_betas()),
    ({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, scaled_linear_betas()),
    ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, cosine_betas(50)),
    ({"trained_betas": [0.1, 0.2, 0.3]}, torch.tensor([0.1, 0.2, 0.3])),
    ({"_class_name": "HeunDiscreteScheduler"}, linear_betas(1000, 0.00085, 0.012)),  # that class's own defaults
])
def test_from_config_reads_the_betas_and_the_defaults(config, betas):
    torch.testing.assert_close(scheduler.discrete(config).alpha_bar, (1 - betas).cumprod(0))
    rescaled = scheduler.discrete({**config, "rescale_betas_zero_snr": True})
    assert rescaled.alpha_bar[-1] == 0 and rescaled.T == len(betas)


def test_unknown_beta_schedule_is_named():
    with pytest.raises(ValueError, match="beta_schedule is 'magic'; supported are linear, scaled_linear, sigmoid"):
        scheduler.discrete({"beta_schedule": "magic"})


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
    for read in (scheduler.discrete, scheduler.from_config, scheduler.clip_range,
                 lambda config: scheduler.from_diffusers(config, 5, SD)):
        with pytest.raises(ValueError, match=message):
            read(config)


def test_null_and_whole_floats_mean_what_is_meant():
    plain = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100}
    odd = {**plain, "num_train_timesteps": 100.0, "beta_start": None, "beta_schedule": None, "steps_offset": None,
           "prediction_type": None, "trained_betas": None, "clip_sample_range": None, "timestep_spacing": None}
    assert torch.equal(scheduler.discrete(odd).alpha_bar, scheduler.discrete(plain).alpha_bar)
    assert scheduler.from_diffusers(odd, 5, scheduler.discrete(odd)) == scheduler.from_diffusers(
        plain, 5, scheduler.discrete(plain))
    assert scheduler.clip_range(odd) == scheduler.clip_range(plain) == 1.0
    with pytest.raises(ValueError, match="has 3 trained_betas, but num_train_timesteps is 100"):
        scheduler.discrete({**plain, "trained_betas": [0.1, 0.2, 0.3]})
    assert scheduler.discrete({"trained_betas": [0.1, 0.5]}).alpha_bar.tolist() == pytest.approx([0.9, 0.45])


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
        scheduler.from_config(config), scheduler.from_diffusers(config, 5, SD)


@pytest.mark.parametrize("change, message", [
    ({"beta_end": 5.0}, "beta_end = 5.0; it should be a number above 0, at most 1"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name = .*; it should be a text")])
def test_what_a_scheduler_config_cannot_say_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        scheduler.discrete({"beta_schedule": "linear", **change})


@pytest.mark.parametrize("name, key, value", [
    ("DDIMScheduler", "thresholding", True), ("DDPMScheduler", "variance_type", "learned_range"),
    ("EulerDiscreteScheduler", "timestep_type", "continuous"), ("PNDMScheduler", "skip_prk_steps", False),
    ("DPMSolverMultistepScheduler", "solver_order", 3), ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
    ("UniPCMultistepScheduler", "solver_order", 3), ("UniPCMultistepScheduler", "predict_x0", False)])
def test_what_the_table_refuses_is_not_the_tables_own_word(name, key, value):
    config = {"_class_name": name, key: value}
    with pytest.raises(ValueError, match=f"{name} with {key}"):
        scheduler.from_config(config), scheduler.from_diffusers(config, 5, SD)


def test_a_consistency_model_scales_its_times_by_ten_unless_it_says_otherwise():
    assert scheduler.from_config({"_class_name": "LCMScheduler"})[1] == {"scaling": 10.0}

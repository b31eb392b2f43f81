"""Samplers that draw noise on the way equal diffusers' schedulers, and where these err, k-diffusion's equations."""

import itertools
import math

import diffusers
import pytest
import torch

from minidiff import samplers
from minidiff.grid import inverse
from minidiff.prediction import denoiser
from minidiff.schedule import SD
from minidiff.sd.scheduler import CLASSES, NAMES, SPACINGS, discrete, from_config, from_diffusers, named, preset
from tests.parity.test_samplers import BASE, KINDS, Z, assert_same, net, reference_class


class Path:
    """Unit noise that is the increment of one Brownian path, which runs over sigma/alpha, from one point to another.

    z: the draws, in our order: of a step's first half, then of its second.
    """

    def __init__(self, z):
        self.z, self.half = z, None

    def __call__(self, start, end):
        if self.half is None:
            self.half = start - end, next(self.z)
            return self.half[1]
        (first, z), self.half = self.half, None
        return (first.sqrt() * z + (start - end - first).sqrt() * next(self.z)) / (start - end).sqrt()


def draws(seed=1):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(Z.shape, generator=generator)


def ours(config, n, kind, **options):
    """All states of our loop, the noise drawn as diffusers does."""
    sampler, found = from_config(config)
    levels, noise = from_diffusers(config, n, discrete(config)), draws()
    steps = sampler(denoiser(net, kind), levels.start(Z), levels, **found, **options, noise=lambda like: next(noise))
    return [step.x for step in steps][1:]


@pytest.mark.parametrize("n", [4, 10, 25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, config", [
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading",
                                     "steps_offset": 1, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False,
                                     "final_sigmas_type": "sigma_min"}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "clip_sample": False})])
def test_every_state_equals_diffusers_with_the_same_seed(name, config, kind, n):
    config = {**BASE, **config, "prediction_type": KINDS[kind]}
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(n)
    x, generator = Z * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    mine = ours({**config, "_class_name": name}, n, kind)
    for state, t in zip(mine, scheduler.timesteps, strict=True):
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
        assert_same(state, x)


def test_the_last_step_adds_no_noise():
    """diffusers' DDPM adds some wherever its time is above 0: with fixed_large the picture itself is noisy then."""
    config = {**BASE, "variance_type": "fixed_large", "clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDPMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    x, generator = Z, torch.Generator().manual_seed(1)
    mine = ours({**config, "_class_name": "DDPMScheduler"}, 10, "eps")
    for state, t in zip(mine, scheduler.timesteps, strict=True):
        step = scheduler.step(net(x, t), t, x, generator=generator)
        x = step.prev_sample
        if t > scheduler.timesteps[-1]:
            assert_same(state, x)
    assert_same(mine[-1], step.pred_original_sample)
    assert (x - step.pred_original_sample).std() > 0.1


@pytest.mark.parametrize("n", [1, 4, 10, 25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
                                    {"use_beta_sigmas": True}, {"timestep_spacing": "leading", "steps_offset": 1},
                                    {"timestep_spacing": "trailing"}], ids=str)
def test_dpmpp_sde_equals_diffusers_on_the_same_brownian_path(config, kind, n):
    config = {**BASE, **config, "prediction_type": KINDS[kind]}
    scheduler = reference_class("DPMSolverSDEScheduler").from_config(config)
    scheduler.set_timesteps(n)
    scheduler.noise_sampler = Path(draws())
    x, theirs = Z * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        theirs.append(x)
    mine = ours({**config, "_class_name": "DPMSolverSDEScheduler"}, n, kind)
    assert len(mine) == n and len(theirs) == 2 * n - 1
    for state, x in zip(mine, theirs[1::2] + theirs[-1:], strict=True):
        assert_same(state, x)


@pytest.mark.parametrize("n", [2, 10, 25])
@pytest.mark.parametrize("spacing", ["exponential", "beta"])
@pytest.mark.parametrize("name", [name for name, made in NAMES.items() if made["_class_name"] in (
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler")])
def test_every_class_with_a_spacing_has_diffusers_levels(name, spacing, n):
    config = {**BASE, **named(f"{name}_{spacing}")}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(n)
    every = slice(1, None, 2) if name == "heun" else slice(1, None)
    sigmas = [*scheduler.sigmas[:1].tolist(), *scheduler.sigmas[every].tolist()]
    times = [*scheduler.timesteps[:1].tolist(), *scheduler.timesteps[every].tolist()]
    levels = from_diffusers(config, n, SD)
    assert [level.sigma / level.alpha for level in levels] == pytest.approx(sigmas, rel=1e-5, abs=1e-6)
    # DPM-Solver++ and UniPC cut the fractions off their times, exact whole ones to one less: we round, as both do with
    # Karras' spacing
    whole = CLASSES[config["_class_name"]].coordinates == "VP"
    assert [level.t for level in levels[:-1]] == pytest.approx(times, rel=1e-5, abs=1.0 if whole else 1e-3)
    if whole:
        assert [level.t for level in levels[:-1]] == [round(inverse(sigma, SD.nsr)) for sigma in sigmas[:-1]]


def test_the_classes_with_spacings_are_diffusers():
    """Each of ours that may end in _karras, and no other; both of ours and of diffusers' options."""
    for name, made in NAMES.items():
        config = reference_class(made["_class_name"]).from_config({}).config
        has = [f"use_{word}_sigmas" in config for word in SPACINGS]
        reads = [f"use_{word}_sigmas" in CLASSES[made["_class_name"]].reads for word in SPACINGS]
        assert has == reads, name


# k-diffusion's equations, at alpha = 1, written as there: sigma is our noise-to-signal ratio

def by_k_diffusion(method, levels, **options):
    """The end of one of k-diffusion's loops on our levels, for an eps net; its model is D(x; sigma) = x − sigma·eps."""
    time, noise = from_config({**BASE, "_class_name": "DPMSolverSDEScheduler"})[1]["time"], draws()
    model = lambda x, sigma: x - sigma * net(x / math.sqrt(sigma**2 + 1), time(sigma))  # noqa: E731
    x = levels.start(Z)
    return method(model, x, [level.sigma for level in levels], lambda: next(noise), **options)


def ancestral(sigma, sigma_next, eta):
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def k_euler(model, x, sigmas, noise, churn, low, high, inflate):
    for sigma, sigma_next in itertools.pairwise(sigmas):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        hat = sigma * (gamma + 1)
        if gamma > 0:
            x = x + noise() * inflate * math.sqrt(hat**2 - sigma**2)
        x = x + (x - model(x, hat)) / hat * (sigma_next - hat)
    return x


def k_euler_ancestral(model, x, sigmas, noise, eta):
    for sigma, sigma_next in itertools.pairwise(sigmas):
        down, up = ancestral(sigma, sigma_next, eta)
        x = x + (x - model(x, sigma)) / sigma * (down - sigma)
        x = x + noise() * up if sigma_next > 0 and up else x
    return x


def k_dpmpp_2m_sde(model, x, sigmas, noise, eta):
    old = h_last = None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = model(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            gain = -math.expm1(-h - eta * h)
            x = sigma_next / sigma * math.exp(-eta * h) * x + gain * denoised
            if old is not None:
                x = x + 0.5 * gain * (h / h_last) * (denoised - old)
            if eta:
                x = x + noise() * sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
            h_last = h
        old = denoised
    return x


def k_dpmpp_sde(model, x, sigmas, noise, eta):
    path = Path(iter(noise, None))
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = model(x, sigma)
        if sigma_next == 0:
            x = denoised
            continue
        mid = math.sqrt(sigma * sigma_next)
        down, up = ancestral(sigma, mid, eta)
        start, half, end = (torch.tensor(value) for value in (sigma, mid, sigma_next))
        ahead = down / sigma * x + (1 - down / sigma) * denoised + path(start, half) * up
        down, up = ancestral(sigma, sigma_next, eta)
        x = down / sigma * x + (1 - down / sigma) * model(ahead, mid) + path(start, end) * up
    return x


def end(sampler, levels, **options):
    noise, options = draws(), {**options}
    if sampler is not samplers.dpmpp_2m_sde and sampler is not samplers.euler_ancestral:
        options |= from_config({**BASE, "_class_name": "DPMSolverSDEScheduler"})[1]
    *_, last = sampler(denoiser(net, "eps"), levels.start(Z), levels, noise=lambda like: next(noise), **options)
    return last.x


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("options", [{"churn": 4.0, "low": 0.0, "high": math.inf, "inflate": 1.0},
                                     {"churn": 40.0, "low": 0.05, "high": 10.0, "inflate": 1.007}], ids=str)
def test_churn_equals_k_diffusion(options, n):
    levels = preset("sd-euler-karras", n)
    assert_same(end(samplers.euler_churn, levels, **options), by_k_diffusion(k_euler, levels, **options))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sampler, method", [(samplers.euler_ancestral, k_euler_ancestral),
                                             (samplers.dpmpp_2m_sde, k_dpmpp_2m_sde),
                                             (samplers.dpmpp_sde, k_dpmpp_sde)])
def test_any_share_of_noise_equals_k_diffusion(sampler, method, eta):
    levels = preset("sd-euler-karras", 20)
    assert_same(end(sampler, levels, eta=eta), by_k_diffusion(method, levels, eta=eta))


def test_diffusers_churns_after_it_has_asked():
    """Its Euler uses the network's answer for x at sigma as if it had been given for x̂ at sigma·(1 + γ)."""
    scheduler = diffusers.EulerDiscreteScheduler(**BASE, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    x, generator = Z * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, s_churn=4.0, generator=generator).prev_sample
    right = by_k_diffusion(k_euler, preset("sd-euler-karras", 20), churn=4.0, low=0.0, high=math.inf, inflate=1.0)
    assert (x - right).abs().max() > 1e-2 * right.abs().max()

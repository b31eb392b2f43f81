"""Schedules: the published numbers of Stable Diffusion, the definitions, and what a scheduler_config.json means."""

import math

import pytest
import torch

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

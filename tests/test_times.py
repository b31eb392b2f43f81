"""Training times: densities against their formulas, curricula against the tables of their papers."""
import math

import pytest
import torch

from minidiff.schedule import Flow
from minidiff.train import times

pytestmark = pytest.mark.quick

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000          # every quantile once


@pytest.mark.parametrize(("drawn", "density"), [
    (times.logit_normal(torch.special.ndtri(U), 0.3, 0.8),                # eq. 19 of arXiv 2403.03206
     lambda t: math.exp(-(math.log(t / (1 - t)) - 0.3) ** 2 / 1.28) / (0.8 * math.sqrt(math.tau) * t * (1 - t))),
    (times.cosmap(U), lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t))])
def test_times_have_their_published_densities(drawn, density):
    for t in (0.1, 0.35, 0.5, 0.8):
        share = ((drawn > t - 0.01) & (drawn < t + 0.01)).double().mean().item()
        assert share / 0.02 == pytest.approx(density(t), rel=1e-2)


@pytest.mark.parametrize("s", [-1.0, 0.5, 1.29, 2 / (math.pi - 2)])
def test_mode_is_a_falling_map_of_the_unit_interval(s):
    t = times.mode(U, s)
    assert (t.diff() <= 1e-12).all() and t[0] == pytest.approx(1, abs=1e-4) and t[-1] == pytest.approx(0, abs=1e-4)
    middle = ((t > 0.4) & (t < 0.6)).double().mean()
    assert (middle > 0.2) == (s > 0)


def test_shifts_multiply_and_lower_the_log_snr():
    t = torch.linspace(1, 999, 50, dtype=torch.float64)
    alpha, sigma = Flow(6.0)(t)
    torch.testing.assert_close(Flow(2.0)(1000 * Flow(3.0)(t)[1])[1], sigma)
    torch.testing.assert_close(Flow(1 / 6.0)(1000 * sigma)[1], t / 1000)
    plain = Flow()(t)
    torch.testing.assert_close(2 * (alpha / sigma).log(), 2 * (plain[0] / plain[1]).log() - 2 * math.log(6))


def test_consistency_training_has_the_papers_levels():
    """Both as in the authors' code, for 800,000 and 400,000 steps."""
    at = (0, 100, 1_000, 10_000, 100_000, 400_000, 800_000)
    assert [times.ct_levels(step, 800_000) for step in at] == [2, 4, 8, 23, 72, 143, 201]
    decays = [times.ct_decay(times.ct_levels(step, 800_000)) for step in (0, 10_000, 800_000)]
    assert decays == pytest.approx([0.95, 0.99555, 0.99949], abs=1e-5)
    found = [times.ict_levels(step, 400_000) for step in range(0, 400_000, 25_000)]
    assert found == [n + 1 for n in (10, 20, 40, 80, 160, 320, 640, 1280) for _ in (0, 1)]
    assert times.ict_levels(400_000, 400_000) == 1281


def test_pairs_of_levels_are_drawn_as_a_normal_variable_falls_between_them():
    levels = torch.linspace(0.002**(1 / 7), 80 ** (1 / 7), 41, dtype=torch.float64) ** 7
    shares = times.ict_shares(levels)
    draws = torch.distributions.Normal(-1.1, 2.0).icdf(U)
    inside = draws[(draws > levels[0].log()) & (draws < levels[-1].log())]
    seen = torch.histc(torch.bucketize(inside, levels.log()).double() - 1, 40, -0.5, 39.5)
    torch.testing.assert_close(shares, seen / seen.sum(), atol=1e-4, rtol=0)
    assert shares.sum() == pytest.approx(1)


def test_neighbours_of_easy_tuning_come_nearer_with_each_stage():
    u = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    gaps = torch.stack([u - times.ect_next(u, stage) for stage in range(4, 9)])
    torch.testing.assert_close(gaps[1:], gaps[:-1] / 2)                   # halved by each, once none is at 0
    assert (times.ect_next(u, 1)[:2] == 0).all() and (gaps > 0).all()

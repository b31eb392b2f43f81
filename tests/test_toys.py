"""The two-dimensional toys: normalised, reproducible, and mixtures that are what their parameters say."""

import pytest
import torch

from minidiff.data import toys

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", toys.NAMES)
def test_mean_is_0_and_mean_square_is_1(name):
    points = toys.sample(name, 20_000, seed=3)
    assert points.shape == (20_000, 2) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 0.03 and abs(points.square().mean() - 1) < 0.03
    assert points.abs().max() < 5


@pytest.mark.parametrize("name", toys.NAMES)
def test_the_seed_decides(name):
    assert torch.equal(toys.sample(name, 50, seed=1), toys.sample(name, 50, seed=1))
    assert not torch.equal(toys.sample(name, 50, seed=1), toys.sample(name, 50, seed=2))
    state = torch.get_rng_state()
    toys.sample(name, 50)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_toys_are_eight_different_distributions():
    def grid(name: str, seed: int = 0) -> torch.Tensor:
        return torch.histogramdd(toys.sample(name, 20_000, seed=seed), 24, range=[-2.5, 2.5] * 2).hist / 20_000

    grids = [grid(name) for name in toys.NAMES]
    overlaps = [torch.minimum(a, b).sum() for i, a in enumerate(grids) for b in grids[:i]]
    assert max(overlaps) < 0.6
    assert torch.minimum(grids[0], grid(toys.NAMES[0], seed=9)).sum() > 0.9


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_points_of_a_mixture_follow_its_parameters(name):
    weights, means, std = toys.mixture(name)
    points = toys.sample(name, 40_000, seed=5)
    nearest = torch.cdist(points, means).argmin(1)
    torch.testing.assert_close(nearest.bincount() / 40_000, weights, atol=0.01, rtol=0)
    for k, mean in enumerate(means):
        torch.testing.assert_close(points[nearest == k].mean(0), mean, atol=0.01, rtol=0)
    assert abs((points - means[nearest]).std().item() / std - 1) < 0.03
    assert weights.sum().item() == pytest.approx(1) and means.mean(0).abs().max() < 1e-6
    assert 0.5 * (weights @ means.square().sum(1)).item() + std**2 == pytest.approx(1)


def test_checkerboard_fills_half_of_the_fields_evenly():
    points = toys.sample("checkerboard", 16_000)
    fields = (2 + points * (2 / 3**0.5)).floor().long()  # a uniform variable on 4 has standard deviation 2/√3
    counts = (4 * fields[:, 0] + fields[:, 1]).clamp(0, 15).bincount(minlength=16).view(4, 4)
    black = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert counts[black].min() > 1600 and counts[~black].sum() < 200


@pytest.mark.parametrize("call, message", [
    (lambda: toys.sample("moon", 5), "no toy called 'moon'; there are moons, circles"),
    (lambda: toys.sample("moons", 0), "n is 0"),
    (lambda: toys.mixture("moons"), "no mixture called 'moons'; there are 'ring' and 'grid'")])
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

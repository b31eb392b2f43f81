"""The likelihood by the probability-flow ODE: equal to the exact density, of order 2, and the estimate is unbiased."""
import pytest
import torch

from minidiff import exact
from minidiff.data import toys
from minidiff.grid import Grid
from minidiff.likelihood import log_likelihood
from minidiff.schedule import Level, amplitudes

pytestmark = pytest.mark.quick

RING = toys.Mixture(*(part.double() for part in toys.mixture("ring")[:2]), toys.mixture("ring").std)


def levels(n, low=0.02, high=100.0):
    us = (low * (high / low) ** (i / n) for i in range(n, -1, -1))
    return Grid(Level(0.0, *amplitudes(u)) for u in us)


def points(n, level):
    g = torch.Generator().manual_seed(0)
    x0 = RING.means[torch.randint(8, (n,), generator=g)] + RING.std * torch.randn(n, 2, generator=g)
    return level.alpha * x0 + level.sigma * torch.randn(n, 2, generator=g, dtype=torch.float64)


def error(n):
    grid = levels(n)
    x = points(20, grid[-1])
    return (log_likelihood(exact.denoiser(RING), x, grid) - exact.log_density(RING, x, grid[-1])).abs().mean().item()


def test_it_equals_the_exact_density_of_a_mixture_and_converges_with_order_2():
    coarse, fine = error(200), error(400)
    assert fine < 1e-3 and 3.2 < coarse / fine < 4.8


def test_an_average_over_all_signs_is_exact_and_one_probe_is_not():
    grid = levels(60)
    x = points(10, grid[-1])
    denoise, truth = exact.denoiser(RING), log_likelihood(exact.denoiser(RING), x, grid)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2)[:, None, :].expand(4, 10, 2)
    torch.testing.assert_close(log_likelihood(denoise, x, grid, probes=signs), truth)
    assert (log_likelihood(denoise, x, grid, probes=signs[:1]) - truth).abs().max() > 0.01


def test_pictures_are_taken_as_they_are():
    gaussian = toys.Mixture(torch.ones(1), torch.zeros(1, 12), 0.5)
    grid, x = levels(300), torch.randn(3, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = exact.log_density(gaussian, x, grid[-1])
    torch.testing.assert_close(log_likelihood(exact.denoiser(gaussian), x, grid), truth, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("ends", [(Level(1.0, 0.6, 0.8), Level(0.0, 1.0, 0.0)),
                                  (Level(1.0, 0.0, 1.0), Level(0.0, 0.8, 0.6))])
def test_a_grid_without_a_density_at_its_ends_is_an_error(ends):
    with pytest.raises(ValueError, match="give a grid whose last level has sigma > 0"):
        log_likelihood(exact.denoiser(RING), torch.zeros(1, 2), Grid(ends))

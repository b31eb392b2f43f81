"""Weights and the variational bound, against closed forms."""
import math

import pytest
import torch

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.grid import Grid
from minidiff.prediction import target
from minidiff.schedule import DDPM, Discrete, Level, linear_betas
from minidiff.train import losses

pytestmark = pytest.mark.quick

MEAN, STD = 0.3, 0.5
GAUSS = Mixture(torch.ones(1), torch.tensor([[MEAN]]), STD)
SIGNS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)   # Gauss-Hermite, exact to degree 3


def chain(T, end=0.02):
    bars = torch.cumprod(1 - linear_betas(T, 1e-4, end).double(), 0).tolist()
    return Grid(Level(float(t), math.sqrt(bars[t]), math.sqrt(1 - bars[t])) for t in reversed(range(T)))


def bound(grid, variances):
    """The expected bound over data and noise, exactly: every term is quadratic in both."""
    x0, eps = MEAN + STD * SIGNS[:, :1], SIGNS[:, 1:]
    return losses.vlb(exact.denoiser(GAUSS), x0, grid, variances, noise=lambda like: eps).mean(1)


def optimal(grid):
    """The variance of p(x_nxt | x_now): the posterior's, and what is not known of x0 (Bao et al. 2022, 2201.06503)."""
    found = []
    for (_, a, s), (_, a1, s1) in zip(grid, [*grid[1:], Level(0.0, 1.0, 0.0)]):
        unknown = STD**2 * s * s / (a * a * STD**2 + s * s)
        r = s1 * a / (a1 * s)
        found.append(s1 * s1 * (1 - r * r) + (a1 * (1 - r * r)) ** 2 * unknown)
    return found


def test_with_the_optimal_variance_the_bound_of_a_gaussian_is_its_entropy():
    """p is then the exact reverse chain, but for the start: it begins at N(0, 1), which x_T is not quite."""
    entropy = 0.5 * math.log(math.tau * math.e * STD**2)
    for T, end in ((50, 0.4), (1000, 0.02)):
        grid = chain(T, end)
        _, a, s = grid[0]
        var = a * a * STD**2 + s * s
        gap = 0.5 * (var + (a * MEAN) ** 2 - 1 - math.log(var))                          # KL(p(x_T) ‖ N(0, 1))
        assert bound(grid, optimal(grid)).sum().item() == pytest.approx(entropy + gap, abs=1e-10)


def test_the_fixed_variances_leave_a_gap():
    grid = chain(1000)
    best, large, small = (bound(grid, v(grid)).sum() for v in (optimal, losses.fixed_large, losses.fixed_small))
    assert 1e-3 < large - best < 1e-2 and 0.5 < small - best < 1


def test_the_posterior_is_the_product_of_two_gaussians():
    """Bayes: q(x_nxt | x_now, x0) ∝ q(x_now | x_nxt)·q(x_nxt | x0), by quadrature; also over several levels at once."""
    here, x, x0 = torch.linspace(-6, 6, 12001, dtype=torch.float64), 0.3, -0.8
    for now, nxt in ((DDPM(600), DDPM(599)), (DDPM(300), DDPM(150)), (DDPM(5), DDPM(0))):
        now, nxt = Level(1.0, *now), Level(0.0, *nxt)
        ratio = now.alpha / nxt.alpha
        beta = now.sigma**2 - (ratio * nxt.sigma) ** 2
        p = (-(x - ratio * here) ** 2 / (2 * beta) - (here - nxt.alpha * x0) ** 2 / (2 * nxt.sigma**2)).softmax(0)
        on_x, on_x0, variance = losses.posterior(now, nxt)
        mean = (p * here).sum()
        assert mean.item() == pytest.approx(on_x * x + on_x0 * x0, abs=1e-9)
        assert (p * (here - mean) ** 2).sum().item() == pytest.approx(variance, rel=1e-6)


def test_each_term_is_a_kl_divergence():
    grid, x0 = chain(8, 0.4), torch.tensor([[0.7]], dtype=torch.float64)
    eps = torch.tensor([[0.4]], dtype=torch.float64)
    variances = losses.fixed_large(grid)
    terms = losses.vlb(exact.denoiser(GAUSS), x0, grid, variances, noise=lambda like: eps)[:, 0]
    now, nxt = grid[3], grid[4]
    x, guess = now.alpha * x0 + now.sigma * eps, exact.denoiser(GAUSS)(now.alpha * x0 + now.sigma * eps, now).x0
    beta = 1 - (now.alpha / nxt.alpha) ** 2

    def posterior_mean(x0):                                                                # DDPM, eq. 7
        return (nxt.alpha * beta * x0 + (now.alpha / nxt.alpha) * nxt.sigma**2 * x) / now.sigma**2

    normal = torch.distributions.Normal
    q = normal(posterior_mean(x0), math.sqrt(nxt.sigma**2 / now.sigma**2 * beta))
    truth = torch.distributions.kl_divergence(q, normal(posterior_mean(guess), math.sqrt(beta)))
    torch.testing.assert_close(terms[4], truth[0, 0])
    prior = torch.distributions.kl_divergence(normal(grid[0].alpha * x0, grid[0].sigma), normal(0.0, 1.0))
    torch.testing.assert_close(terms[0], prior[0, 0])
    guess = exact.denoiser(GAUSS)(grid[-1].alpha * x0 + grid[-1].sigma * eps, grid[-1]).x0
    torch.testing.assert_close(terms[-1], -normal(guess, math.sqrt(variances[-1])).log_prob(x0)[0, 0])


def test_pictures_add_up_their_pixels():
    grid, x0 = chain(8, 0.4), torch.tensor([[0.7]], dtype=torch.float64)
    one, many = (losses.vlb(lambda x, level: (x / 2, None), part, grid, losses.fixed_small(grid), torch.ones_like)
                 for part in (x0, x0.expand(2, 12).view(2, 3, 2, 2)))
    torch.testing.assert_close(many, (12 * one).expand_as(many))


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_the_implied_weight_is_the_ratio_of_two_losses(kind):
    x = torch.randn(3, 5, dtype=torch.float64)
    for t in (0, 400, 999):
        alpha, sigma = DDPM(t)
        eps, off = torch.randn_like(x), torch.randn_like(x)
        truth, guess = (target(kind, (x - sigma * e) / alpha, e, alpha, sigma) for e in (eps, off))
        torch.testing.assert_close((truth - guess).square().sum() / (eps - off).square().sum(),
                                   torch.tensor(losses.implied_weight(kind, alpha, sigma), dtype=torch.float64))


def test_min_snr_weighs_every_kind_alike():
    alpha, sigma = (c.double() for c in Discrete(DDPM.alpha_bar)(torch.arange(1000)))
    snr = (alpha / sigma) ** 2
    for kind in ("eps", "x0", "v", "flow"):
        on_x0 = losses.min_snr(kind, alpha, sigma) * losses.implied_weight(kind, alpha, sigma) * snr
        torch.testing.assert_close(on_x0, snr.clamp(max=5.0))
    torch.testing.assert_close(losses.min_snr("v", alpha, sigma), snr.clamp(max=5.0) / (snr + 1))

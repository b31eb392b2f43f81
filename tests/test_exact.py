"""Exact denoisers: equal to quadrature, to autograd of the log density, and to a mixture written down another way."""
import pytest
import torch

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.prediction import score
from minidiff.schedule import SD, Level
from tests.exact import TWO

pytestmark = pytest.mark.quick

LEVELS = [*(Level(t, *SD(t)) for t in (5, 300, 800)), Level(0.0, 1.0, 14.6), Level(0.0, 0.25, 0.75),
          Level(0.0, 0.0, 1.0)]
PLANE = Mixture(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
                torch.tensor([[-1.0, 0.5], [0.3, 0.2], [1.0, -1.5]], dtype=torch.float64),
                torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", LEVELS)
def test_on_the_line_it_equals_the_mixture_of_the_tests(level):
    own = Mixture(torch.tensor(TWO.weights), torch.tensor(TWO.means)[:, None], torch.tensor(TWO.stds))
    x = normal(50, 1)
    for ours, theirs in zip(exact.denoiser(own)(x, level), TWO.denoise(x, level)):
        torch.testing.assert_close(ours, theirs)
    posterior = exact.log_joint(own, x, level).log_softmax(1)
    torch.testing.assert_close(posterior, torch.stack([TWO.log_posterior(k, x[:, 0], level) for k in range(2)], 1))


@pytest.mark.parametrize("level", LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(level):
    x = normal(20, 2).requires_grad_()
    (truth,) = torch.autograd.grad(exact.log_density(PLANE, x, level).sum(), x)
    pred = exact.denoiser(PLANE)(x.detach(), level)
    torch.testing.assert_close(score(pred, level), truth)
    torch.testing.assert_close(level.alpha * pred.x0 + level.sigma * pred.eps, x.detach())


def test_the_density_is_the_integral_over_clean_data():
    level = Level(0.0, 0.8, 0.6)
    side = torch.linspace(-5, 5, 401, dtype=torch.float64)
    clean = torch.cartesian_prod(side, side)
    prior = exact.log_density(PLANE, clean, Level(0.0, 1.0, 0.0)).exp() * (10 / 400) ** 2
    assert prior.sum() == pytest.approx(1, abs=1e-6)
    for x in normal(3, 2):
        noise = torch.distributions.Normal(0.8 * clean, 0.6).log_prob(x).sum(1).exp()
        joint = prior * noise
        assert exact.log_density(PLANE, x[None], level).exp().item() == pytest.approx(joint.sum().item(), rel=1e-6)
        mean = (joint[:, None] * clean).sum(0) / joint.sum()
        torch.testing.assert_close(exact.denoiser(PLANE)(x[None], level).x0[0], mean, rtol=1e-6, atol=1e-8)


def test_the_ideal_denoiser_of_pictures_is_a_softmax_over_them():
    pictures, x, level = normal(7, 3, 4, 4), normal(2, 3, 4, 4, seed=1), Level(0.0, 0.8, 0.6)
    far = (x[:, None] - 0.8 * pictures[None]).square().sum((2, 3, 4))
    share = (-far / (2 * 0.6**2)).softmax(1)
    pred = exact.denoiser(exact.points(pictures))(x, level)
    torch.testing.assert_close(pred.x0, torch.einsum("bn,nchw->bchw", share, pictures))
    torch.testing.assert_close(0.8 * pred.x0 + 0.6 * pred.eps, x)


def test_at_low_noise_the_ideal_denoiser_returns_the_nearest_picture():
    pictures = normal(7, 3, 4, 4).float()
    x = 0.99 * pictures[3:4] + 0.05
    torch.testing.assert_close(exact.denoiser(exact.points(pictures))(x, Level(0.0, 0.99, 0.1)).x0, pictures[3:4])


def test_the_consistency_function_of_a_gaussian_is_known():
    """Paths of a Gaussian scale: y − m grows as √(s² + u²)."""
    mean, std, least = torch.tensor([[0.3, -1.0]]).double(), 0.4, 0.002
    end = exact.consistency(Mixture(torch.ones(1).double(), mean, std), least)
    for level in (Level(0.0, 1.0, 80.0), Level(0.0, 0.6, 0.8), Level(0.0, 1.0, 0.01)):
        x, u = normal(20, 2), level.sigma / level.alpha
        found = end(x, level)
        truth = mean + (x / level.alpha - mean) * ((std**2 + least**2) / (std**2 + u * u)) ** 0.5
        torch.testing.assert_close(found.x0, truth, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x)


def test_the_consistency_function_of_a_mixture_is_the_end_of_its_path():
    """To 1e-8: twice as many steps change nothing, and other points of the same path end there too."""
    end, finer, further = (exact.consistency(PLANE, 0.002, steps=steps) for steps in (1000, 2000, 2000))
    x = normal(30, 2)
    far, near = Level(0.0, 1.0, 3.0), Level(0.0, 1.0, 0.4)
    torch.testing.assert_close(end(3 * x, far).x0, finer(3 * x, far).x0, atol=1e-8, rtol=0)
    midway = exact.consistency(PLANE, near.sigma)(3 * x, far).x0
    torch.testing.assert_close(further(midway, near).x0, end(3 * x, far).x0, atol=1e-8, rtol=0)


def test_a_consistency_function_leaves_what_stands_at_the_end():
    x = normal(5, 2)
    at = exact.consistency(PLANE, 0.05)(x, Level(0.0, 1.0, 0.05))
    torch.testing.assert_close(at.x0, x, atol=1e-12, rtol=0)


def test_one_call_of_the_consistency_function_draws_the_data():
    """Of the denoiser it draws the mean."""
    z, level = 80 * normal(4000, 2), Level(0.0, 1.0, 80.0)
    drawn = exact.consistency(PLANE, 0.002)(z, level).x0
    mean = PLANE.weights @ PLANE.means
    cov = (PLANE.means - mean).T @ torch.diag(PLANE.weights) @ (PLANE.means - mean)
    cov = cov + (PLANE.weights @ PLANE.std**2) * torch.eye(2)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), cov, atol=0.05, rtol=0)
    assert exact.denoiser(PLANE)(z, level).x0.std(0).max() < 0.05


@pytest.mark.parametrize(("mixture", "least"), [(PLANE, -0.1), (exact.points(torch.zeros(2, 2)), 0.0)])
def test_paths_that_have_no_end_are_refused(mixture, least):
    with pytest.raises(ValueError, match="must be at least 0"):
        exact.consistency(mixture, least)

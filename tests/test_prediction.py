"""Prediction types: two linear equations, there and back, in any coordinates."""

import math

import pytest
import torch

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.prediction import KINDS, coefficients, consistent, denoiser, score, split, target
from minidiff.schedule import SD, Level
from tests.exact import PLACES

pytestmark = pytest.mark.quick
X0, EPS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
U = 1.7  # noise to signal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coordinates", PLACES)
def test_split_undoes_target(kind, coordinates):
    alpha, sigma = PLACES[coordinates](U)
    found = split(kind, alpha * X0 + sigma * EPS, target(kind, X0, EPS, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(tuple(found), (X0, EPS))


@pytest.mark.parametrize("kind", KINDS)
def test_split_keeps_the_state_whatever_the_net_says(kind):
    x0, eps = split(kind, X0, EPS, 0.6, 0.8)
    torch.testing.assert_close(0.6 * x0 + 0.8 * eps, X0)
    torch.testing.assert_close(target(kind, x0, eps, 0.6, 0.8), EPS)


def test_targets_are_the_published_definitions():
    a, s = 0.6, 0.8
    definitions = {"eps": EPS, "x0": X0, "v": a * EPS - s * X0, "flow": EPS - X0}
    for kind, expected in definitions.items():
        torch.testing.assert_close(target(kind, X0, EPS, a, s), expected)
    d, y = 0.5, X0 + U * EPS  # Karras et al. 2022, table 1: D(y) = c_skip·y + c_out·F
    c_skip, c_out, k = d**2 / (U**2 + d**2), U * d / math.hypot(U, d), 1 / math.hypot(U, d)
    torch.testing.assert_close(c_skip * y + c_out * target("edm", X0, EPS, k, k * U), X0)


def test_v_and_flow_are_velocities_along_their_paths():
    def velocity(path, at, h=1e-5):
        return (path(at + h) - path(at - h)) / (2 * h)

    v = velocity(lambda r: math.cos(r) * X0 + math.sin(r) * EPS, 0.9)
    torch.testing.assert_close(target("v", X0, EPS, math.cos(0.9), math.sin(0.9)), v)
    torch.testing.assert_close(target("flow", X0, EPS, 0.1, 0.9), velocity(lambda r: (1 - r) * X0 + r * EPS, 0.9))


@pytest.mark.parametrize("kind", KINDS)
def test_target_takes_one_level_per_picture(kind):
    alpha, sigma = torch.tensor([[0.8], [0.6], [0.1]]).double(), torch.tensor([[0.6], [0.8], [0.9]]).double()
    rows = [target(kind, X0[i], EPS[i], alpha[i], sigma[i]) for i in range(3)]
    torch.testing.assert_close(target(kind, X0, EPS, alpha, sigma), torch.stack(rows))


@pytest.mark.parametrize("kind, alpha, sigma", [("eps", 0.0, 1.0), ("x0", 1.0, 0.0)])
def test_what_cannot_be_split_is_an_error(kind, alpha, sigma):
    with pytest.raises(ValueError, match=f"a {kind} prediction at alpha = .* does not tell x0 and eps apart"):
        split(kind, X0, EPS, alpha, sigma)


def test_v_at_alpha_zero_gives_the_picture():
    x0, eps = split("v", EPS, target("v", X0, EPS, 0.0, 1.0), 0.0, 1.0)
    torch.testing.assert_close((x0, eps), (X0, EPS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_does_not_depend_on_the_coordinates(kind):
    denoise = denoiser(lambda x, t: torch.sin(x) + t / 1000, kind)
    found = []
    for place in PLACES.values():
        alpha, sigma = place(U)
        found.append(tuple(denoise(alpha * X0 + sigma * EPS, Level(300.0, alpha, sigma))))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("kind, scale", [("eps", math.hypot(1, U)), ("x0", math.hypot(1, U)), ("v", math.hypot(1, U)),
                                         ("flow", 1 + U), ("edm", math.hypot(0.5, U))])
def test_the_net_sees_the_coordinates_it_was_trained_in(kind, scale):
    seen = []
    denoise = denoiser(lambda x, t: seen.append((x, t)) or x, kind)
    denoise(X0, Level(12.5, 1.0, U))
    torch.testing.assert_close(seen[0][0], X0 / scale)
    assert seen[0][1] == 12.5


def test_unknown_kind_is_named_before_any_sampling():
    for call in (lambda: denoiser(lambda x, t: x, "noise"), lambda: coefficients("noise", 1.0, 1.0)):
        with pytest.raises(ValueError, match="unknown prediction kind 'noise'; there are eps, x0, v, flow, edm"):
            call()


def test_a_consistency_function_is_the_identity_at_its_last_level():
    """Whatever the net says, and in any coordinates; elsewhere it is Song et al.'s formula."""
    wild = lambda x, t: 1e3 + torch.exp(x)  # noqa: E731
    for alpha in (1.0, 0.6):
        found = consistent(wild, 0.002)(X0, Level(0.0, alpha, 0.002 * alpha))
        torch.testing.assert_close(found.x0, X0 / alpha, atol=0, rtol=1e-15)
    seen = []
    x0, eps = consistent(lambda x, t: seen.append((x, t)) or torch.sin(x), 0.002)(X0, Level(7.0, 1.0, 3.0))
    skip, out = 0.25 / (2.998**2 + 0.25), 0.5 * 2.998 / 9.25**0.5
    torch.testing.assert_close(x0, skip * X0 + out * torch.sin(X0 / 9.25**0.5))
    torch.testing.assert_close(x0 + 3.0 * eps, X0)
    assert seen[0][1] == 7.0


@pytest.mark.parametrize("level", [*(Level(0.0, 1 - s, s) for s in (0.02, 0.3, 0.9)),
                                   *(Level(0.0, *SD(t)) for t in (9, 600))])
def test_velocity_score_and_noise_are_three_names_of_one_answer(level):
    """On a Gaussian in closed form, on a mixture by autograd: velocity -> x0, eps -> score, and any path's velocity.

    score = (alpha·velocity/alpha' − x)/(sigma² − alpha·sigma·sigma'/alpha'), primes for the path's slopes.
    """
    _, a, s = level
    mean, std, x = 0.4, 0.5, torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    pair = Mixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [0.6]]).double(), 0.2)
    var = a * a * std**2 + s * s
    gauss = Mixture(torch.ones(1).double(), torch.tensor([[mean]]).double(), std)
    leaf = x.clone().requires_grad_()
    by_hand = torch.autograd.grad(exact.log_density(pair, leaf, level).sum(), leaf)[0]
    for data, truth in ((gauss, -(x - a * mean) / var), (pair, by_hand)):
        x0, eps = exact.denoiser(data)(x, level)
        for kind in ("flow",) if abs(a + s - 1) < 1e-9 else ("v", "eps"):  # of a net in its own coordinates
            out = target(kind, x0, eps, a, s)
            found = denoiser(lambda x, t, out=out: out, kind)(x, level)
            torch.testing.assert_close(score(found, level), truth, atol=1e-6, rtol=1e-6)
        for slope_a, slope_s in ((-1.0, 1.0), (-s, a), (-0.3, 2.0)):      # straight, circle, any
            velocity = slope_a * x0 + slope_s * eps
            general = (a * velocity / slope_a - x) / (s * s - a * s * slope_s / slope_a)
            torch.testing.assert_close(general, truth, atol=1e-6, rtol=1e-6)

"""Guidance: its identities, and the exact classifier of a mixture."""

import pytest
import torch

from minidiff import guidance
from minidiff.grid import Step
from minidiff.prediction import Pred
from minidiff.schedule import Level
from tests.exact import TWO, Mixture

pytestmark = pytest.mark.quick
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COND, UNCOND = {"c": torch.tensor([1.0, 2.0, 3.0]).double()}, {"c": torch.tensor([0.5, -1.0, 0.0]).double()}
LEVEL = Level(400.0, 0.8, 0.6)


def net(x, t, c):
    return torch.sin(x * (1 + c[:, None, None])) + c[:, None, None] * t / 1000


def outputs(scale, rescale=0.0):
    guided = guidance.cfg(net, COND, UNCOND, scale, rescale)
    return guided(X, 400.0), net(X, 400.0, **COND), net(X, 400.0, **UNCOND)


def test_cfg_is_unconditional_at_zero_and_conditional_at_one():
    torch.testing.assert_close(outputs(0.0)[0], outputs(0.0)[2])
    torch.testing.assert_close(outputs(1.0)[0], outputs(1.0)[1])


def test_cfg_is_linear_in_the_scale():
    out, cond, uncond = outputs(7.5)
    torch.testing.assert_close(out, uncond + 7.5 * (cond - uncond))
    torch.testing.assert_close((outputs(2.0)[0] + outputs(13.0)[0]) / 2, out)


def test_cfg_is_not_s_cond_plus_s_minus_one_uncond():
    out, cond, uncond = outputs(3.0)
    torch.testing.assert_close(out, 3 * cond - 2 * uncond)
    assert (out - (3 * cond + 2 * uncond)).abs().max() > 1


def test_cfg_asks_the_net_once_with_twice_the_batch():
    calls = []
    guidance.cfg(lambda x, t, c: calls.append(len(x)) or x, COND, UNCOND, 2.0)(X, 0.0)
    assert calls == [6]


def test_full_rescale_has_the_standard_deviation_of_the_conditional_output():
    out, cond, _ = outputs(7.5, rescale=1.0)
    torch.testing.assert_close(out.std((1, 2)), cond.std((1, 2)))
    half, plain = outputs(7.5, rescale=0.5)[0], outputs(7.5)[0]
    torch.testing.assert_close(half, (plain + out) / 2)


def test_clip_bounds_x0_and_keeps_the_state():
    def wild(x, level):
        return Pred(5 * x, (x - level.alpha * 5 * x) / level.sigma)

    x0, eps = guidance.clip(wild)(X, LEVEL)
    assert x0.abs().max() <= 1 and (x0 != 5 * X).any()
    torch.testing.assert_close(LEVEL.alpha * x0 + LEVEL.sigma * eps, X)


@pytest.mark.parametrize("level", [LEVEL, Level(200.0, 0.96, 0.28), Level(0.0, 1.0, 0.5)])
def test_classifier_guidance_needs_sigma(level):
    """The exact classifier turns the mixture's denoiser into that of one component; without sigma it does not."""
    first = Mixture(TWO.weights[:1], TWO.means[:1], TWO.stds[:1])
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def log_prob(x, level):
        return TWO.log_posterior(0, x, level)

    expected = first.denoise(x, level)
    torch.testing.assert_close(tuple(guidance.classifier_guidance(TWO.denoise, log_prob, 1.0)(x, level)),
                               tuple(expected), rtol=0, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(log_prob(leaf, level).sum(), leaf)
    assert (TWO.denoise(x, level).eps - grad - expected.eps).abs().max() > 0.1


def test_interval_guides_inside_and_leaves_alone_outside_in_any_coordinates():
    loud, quiet = (lambda x, level: Pred(2 * x, x)), (lambda x, level: Pred(x, x))

    def guided(low, high, level):
        return torch.equal(guidance.interval(loud, quiet, low, high)(X, level).x0, 2 * X)

    assert guided(0.6 / 0.8, 0.6 / 0.8, LEVEL) and guided(0.0, 1.0, LEVEL)        # the ends belong to it
    assert not guided(0.76, 2.0, LEVEL) and not guided(0.0, 0.74, LEVEL)
    assert guided(0.7, 0.8, Level(0.0, 1.0, 0.75)) and guided(0.7, 0.8, Level(0.0, 4 / 7, 3 / 7))
    assert not guided(0.0, 100.0, Level(999.0, 0.0, 1.0)) and guided(1.0, torch.inf, Level(999.0, 0.0, 1.0))


def test_interval_asks_one_denoiser_per_level():
    calls = []
    limited = guidance.interval(lambda *_: calls.append("guided"), lambda *_: calls.append("plain"), 0.5, 2.0)
    for sigma in (3.0, 1.0, 0.1):
        limited(X, Level(0.0, 1.0, sigma))
    assert calls == ["plain", "guided", "plain"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_last_state_alone_is_pasted_and_only_what_is_known_of_it(n):
    steps = [Step(LEVEL, X + i, None if i == 0 else X) for i in range(n)]  # one level for all of them
    mask = (X > 0).double()
    *before, last = guidance.paste(iter(steps), -X, mask)
    assert all(got is given for got, given in zip(before, steps[:-1], strict=True))
    torch.testing.assert_close(last.x, mask * steps[-1].x - (1 - mask) * X)
    assert last.level is LEVEL and last.x0 is steps[-1].x0


def test_classifier_guidance_at_scale_zero_does_nothing_and_any_scale_keeps_the_state():
    def log_prob(x, level):
        return TWO.log_posterior(0, x, level).sum((1, 2))

    plain = TWO.denoise(X, LEVEL)
    torch.testing.assert_close(tuple(guidance.classifier_guidance(TWO.denoise, log_prob, 0.0)(X, LEVEL)), tuple(plain))
    x0, eps = guidance.classifier_guidance(TWO.denoise, log_prob, 3.0)(X, LEVEL)
    torch.testing.assert_close(LEVEL.alpha * x0 + LEVEL.sigma * eps, X)


def test_classifier_guidance_works_inside_inference_mode():
    def log_prob(x, level):
        return TWO.log_posterior(0, x, level).sum((1, 2))

    guided = guidance.classifier_guidance(TWO.denoise, log_prob, 2.0)
    with torch.inference_mode():
        inside = guided(X * 1, LEVEL)
    torch.testing.assert_close(tuple(inside), tuple(guided(X, LEVEL)))


def test_classifier_guidance_at_alpha_zero_is_an_error():
    guided = guidance.classifier_guidance(TWO.denoise, lambda x, level: x, 1.0)
    with pytest.raises(ValueError, match="classifier guidance needs alpha > 0"):
        guided(X, Level(999.0, 0.0, 1.0))

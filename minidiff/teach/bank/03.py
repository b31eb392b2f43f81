"""Exercises of notebook 03, the ε-loss."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minidiff.teach.check import Exercise


def l_simple(net, x0, eps, t, alpha, sigma):
    """Mean over points and coordinates of |net(alpha_t·x0 + sigma_t·eps, t) − eps|²."""
    x = alpha[t][:, None] * x0 + sigma[t][:, None] * eps
    return (net(x, t) - eps).square().mean()


def best_multiple(alpha, sigma, s):
    """The c with the smallest E|eps − c·x|², and that loss, for data of mean square s²."""
    c = sigma / (alpha**2 * s**2 + sigma**2)
    return c, 1 - c * sigma


def v_target(x0, eps, alpha, sigma):
    """v = dx/dφ of x = cos φ·x0 + sin φ·eps, with alpha = cos φ, sigma = sin φ."""
    return alpha * eps - sigma * x0


def from_v(x, v, alpha, sigma):
    """x0 and eps, for alpha² + sigma² = 1: the rotation by φ, undone."""
    return alpha * x - sigma * v, sigma * x + alpha * v


@dataclass(frozen=True)
class Net:
    """Stands for a network; a class, because it has a name that can be printed."""

    def __call__(self, x, t):
        return torch.sin(3 * x + 0.5 * t[:, None])


def off(answer):
    """A wrong l_simple: `answer(x, net's output, x0, eps)` is squared and averaged."""
    def wrong(net, x0, eps, t, alpha, sigma):
        x = alpha[t][:, None] * x0 + sigma[t][:, None] * eps
        return answer(x, net(x, t), x0, eps).square().mean()
    return wrong


def mixed(a, s, x0, eps):
    return a[:, None] * x0 + s[:, None] * eps


ALPHA = torch.tensor([0.995, 0.9, 0.6, 0.2])
SIGMA = (1 - ALPHA**2).sqrt()
G = torch.Generator().manual_seed(0)
# x0 asks for a gradient, as the weights of a network would: a loss must let it through. As many points as coordinates:
# where broadcasting does not complain
BATCH = tuple((Net(), torch.randn(2, 2, generator=G).requires_grad_(), torch.randn(2, 2, generator=G), torch.tensor(t),
               ALPHA, SIGMA) for t in ([0, 2], [3, 1], [2, 2]))
LEVELS = tuple((ALPHA, SIGMA, s) for s in (1.0, 0.5, 2.0)) + ((torch.tensor(0.8), torch.tensor(0.6), 0.25),)
PAIRS = tuple((torch.randn(5, 2, generator=G), torch.randn(5, 2, generator=G), a, (1 - a * a) ** 0.5)
              for a in (0.9, 0.6, 0.1))

EXERCISES = {
    "03.1": Exercise(
        "the ε-loss of a batch", 1, 5, l_simple, BATCH,
        wrong={
            "the noise went in with sigma², its variance; its amplitude is sigma, the square root of 1 − alpha_bar":
                lambda net, x0, eps, t, a, s: (net(mixed(a[t], s[t] ** 2, x0, eps), t) - eps).square().mean(),
            "alpha[t] has one number per point but was spread over the coordinates: write alpha[t][:, None]":
                lambda net, x0, eps, t, a, s: (net(a[t] * x0 + s[t] * eps, t) - eps).square().mean(),
            "the answer is compared with the noisy point; the target is the noise in it, eps":
                off(lambda x, out, x0, eps: out - x),
            "the answer is compared with the clean point; that is another kind of network, further below":
                off(lambda x, out, x0, eps: out - x0),
            "the network was given the clean point: there is no noise in it to be found":
                lambda net, x0, eps, t, a, s: (net(x0, t) - eps).square().mean(),
            "the target was scaled by sigma: the network estimates the unit noise eps, not the share of it in x":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, eps), t), s[t][:, None] * eps),
            "another noise is in the state; it must be the eps of the target, or nothing about it can be learned":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, torch.randn_like(eps)), t), eps),
            "the target is another noise; it must be the eps of the state, or nothing about it can be learned":
                off(lambda x, out, x0, eps: out - torch.randn_like(eps)),
            "fresh noise is drawn; take the eps that is given, for the state and as the target":
                lambda net, x0, eps, t, a, s: l_simple(net, x0, torch.randn_like(eps), t, a, s),
            "the number is right, but nothing leads back from it to the weights, and no network learns: leave out "
            ".item(), .detach() and no_grad, and return the tensor": lambda *row: l_simple(*row).detach(),
            "this adds up the coordinates, so it is D times too large: average over them as well":
                lambda *row: 2 * l_simple(*row),
            "this adds up everything; average over points and coordinates": lambda *row: 4 * l_simple(*row),
            "this is the root of the mean square; the loss is the mean square itself":
                lambda *row: l_simple(*row).sqrt(),
            "the differences are not squared, they are taken without their sign":
                lambda net, x0, eps, t, a, s: (net(mixed(a[t], s[t], x0, eps), t) - eps).abs().mean(),
        },
        also=(lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, eps), t), eps),
              lambda net, x0, eps, t, a, s: sum(
                  (net(a[i] * x[None] + s[i] * e[None], i[None])[0] - e).pow(2).sum() / 2 for x, e, i in
                  zip(x0, eps, t)) / len(t))),
    "03.2": Exercise(
        "the best multiple of x, and its loss", 2, 10, best_multiple, LEVELS,
        wrong={
            "1/sigma would be right if x were nothing but noise; part of x is data, so answer less":
                lambda a, s, d: (1 / s, (a * d / s) ** 2),
            "this is the multiple that guesses the clean point, alpha·s²/(…); the noise in x has the amplitude sigma":
                lambda a, s, d: (a * d**2 / (a**2 * d**2 + s**2), s**2 / (a**2 * d**2 + s**2)),
            "c is right, and the loss is what is left: 1 minus what you have":
                lambda a, s, d: (best_multiple(a, s, d)[0], s**2 / (a**2 * d**2 + s**2)),
            "the mean square of the data is s², not s: data enter the variance of x with alpha²·s²":
                lambda a, s, d: (s / (a**2 * d + s**2), a**2 * d / (a**2 * d + s**2)),
            "this is right for s = 1 only; the variance of x is alpha²·s² + sigma²": lambda a, s, d: (s, a**2),
            "c is right, but this is the root of the loss; leave it squared":
                lambda a, s, d: (best_multiple(a, s, d)[0], best_multiple(a, s, d)[1].sqrt()),
            "the two are swapped: first c, then the loss": lambda *row: best_multiple(*row)[::-1],
        },
        also=(lambda a, s, d: (1 / (s + (a * d) ** 2 / s), 1 / (1 + (s / (a * d)) ** 2)),
              lambda a, s, d: (lambda c: (c, (1 - c * s) ** 2 + (c * a * d) ** 2))(s / (a * a * d * d + s * s)))),
    "03.3": Exercise(
        "the target of v-prediction", 1, 5, v_target, PAIRS,
        wrong={
            "wrong sign: the derivative of the cosine is minus the sine, so it is alpha·eps − sigma·x0":
                lambda x0, eps, a, s: s * x0 - a * eps,
            "both signs are plus here; the derivative of cos φ is −sin φ": lambda x0, eps, a, s: a * eps + s * x0,
            "alpha and sigma are swapped: turning by 90° takes x0 to eps and eps to −x0":
                lambda x0, eps, a, s: s * eps - a * x0,
            "this is x itself; v is its derivative": lambda x0, eps, a, s: a * x0 + s * eps,
            "alpha² and sigma² for alpha and sigma: the derivatives of cos and sin are not squared":
                lambda x0, eps, a, s: a**2 * eps - s**2 * x0,
            "this is eps − x0, the velocity of the straight path of flow matching; here the path is a circle":
                lambda x0, eps, a, s: eps - x0,
        },
        also=(lambda x0, eps, a, s: (eps - s * (a * x0 + s * eps)) / a,)),
    "03.4": Exercise(
        "from v back to x0 and eps", 2, 10, from_v, PAIRS,
        wrong={
            "the turn went the wrong way: x0 = alpha·x − sigma·v and eps = sigma·x + alpha·v":
                lambda x, v, a, s: (a * x + s * v, a * v - s * x),
            "the two are swapped: first x0, then eps": lambda *row: from_v(*row)[::-1],
            "x0 is right; in eps the v counts with plus: eps = sigma·x + alpha·v":
                lambda x, v, a, s: (a * x - s * v, s * x - a * v),
            "eps is right; in x0 the v counts with minus: x0 = alpha·x − sigma·v":
                lambda x, v, a, s: (a * x + s * v, s * x + a * v),
            "alpha and sigma are swapped": lambda x, v, a, s: (s * x - a * v, a * x + s * v),
            "alpha² and sigma² for alpha and sigma: nothing is squared, because alpha² + sigma² = 1 is already used":
                lambda x, v, a, s: (a**2 * x - s**2 * v, s**2 * x + a**2 * v),
            "in both the v has the wrong sign: x0 = alpha·x − sigma·v and eps = sigma·x + alpha·v":
                lambda x, v, a, s: (a * x + s * v, s * x - a * v),
            "x0 is right; x − alpha·x0 is sigma·eps, so it remains to divide it by sigma":
                lambda x, v, a, s: (a * x - s * v, s * (s * x + a * v)),
            "v was taken for eps: (x − sigma·v)/alpha is right for a network that predicts eps":
                lambda x, v, a, s: ((x - s * v) / a, v),
            "v was taken for x0: (x − alpha·v)/sigma is right for a network that predicts x0":
                lambda x, v, a, s: (v, (x - a * v) / s),
        },
        also=(lambda x, v, a, s: ((x - s * (s * x + a * v)) / a, s * x + a * v),
              lambda x, v, a, s: (a * x - s * v, (v + s * (a * x - s * v)) / a))),
}

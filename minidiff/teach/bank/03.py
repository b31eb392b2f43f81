"""Exercises of notebook 03, the ε-loss."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minidiff.teach.check import Exercise


def repaired(net, x0, eps, t, alpha, sigma):
    """Two mistakes: the state held another noise than the target, and the network, which counts from 0, was fed t."""
    x = alpha[t][:, None] * x0 + sigma[t][:, None] * eps
    return (net(x, t - 1) - eps).square().mean()


def best_multiple(alpha, sigma, width):
    """The gain with the smallest E|eps − gain·x|², and that loss, for data of deviation width."""
    gain = sigma / (alpha**2 * width**2 + sigma**2)
    return gain, 1 - gain * sigma


def loss_of_multiple(k, optimum):
    """(3.6) with the excess |k − 1|² E|E[eps|x]|², whose mean square is 1 − optimum by (3.5)."""
    return optimum + (k - 1) ** 2 * (1 - optimum)


def kind_of(net, x0, eps, t, alpha, sigma):
    """The target with the smallest mean squared difference from the network's answers."""
    a, s = alpha[t][:, None], sigma[t][:, None]
    out = net(a * x0 + s * eps, t - 1)
    targets = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}
    return min(targets, key=lambda kind: (out - targets[kind]).square().mean().item())


@dataclass(frozen=True)
class Net:
    """Stands for a network; a class, because it has a name that can be printed."""

    def __call__(self, x, t):
        return torch.sin(3 * x + 0.5 * t[:, None])


@dataclass(frozen=True)
class Trained:
    """Knows the noise of its states, and answers what a network of this kind should, a little off."""

    kind: str

    def __call__(self, x, t):
        a, s = ALPHA[t + 1][:, None], SIGMA[t + 1][:, None]
        return four((x - s * NOISE) / a, NOISE, a, s)[self.kind] + 0.05


def off(answer):
    """A wrong loss: `answer(x, net's output, x0, eps)` is squared and averaged."""
    def wrong(net, x0, eps, t, alpha, sigma):
        x = mixed(alpha[t], sigma[t], x0, eps)
        return answer(x, net(x, t - 1), x0, eps).square().mean()
    return wrong


def mixed(a, s, x0, eps):
    return a[:, None] * x0 + s[:, None] * eps


def nearest(targets, pick=min, fed=lambda t: t - 1):
    """A wrong kind_of: other targets, another choice among them, another time."""
    def wrong(net, x0, eps, t, alpha, sigma):
        a, s = alpha[t][:, None], sigma[t][:, None]
        out = net(a * x0 + s * eps, fed(t))
        of = targets(x0, eps, a, s)
        return pick(of, key=lambda kind: (out - of[kind]).square().mean().item())
    return wrong


def four(x0, eps, a, s):
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}


ALPHA = torch.tensor([1.0, 0.995, 0.9, 0.6, 0.2])  # clean at 0
SIGMA = (1 - ALPHA**2).sqrt()
G = torch.Generator().manual_seed(0)
# x0 asks for a gradient, as the weights of a network would: a loss must let it through. As many points as coordinates:
# where broadcasting does not complain
BATCH = tuple((Net(), torch.randn(2, 2, generator=G).requires_grad_(), torch.randn(2, 2, generator=G), torch.tensor(t),
               ALPHA, SIGMA) for t in ([1, 3], [4, 2], [3, 3]))
LEVELS = tuple((ALPHA[1:], SIGMA[1:], s) for s in (1.0, 0.5, 2.0)) + ((torch.tensor(0.8), torch.tensor(0.6), 0.25),)
NOISE, CLEAN = torch.randn(2, 64, 2, generator=G)
TIMES = torch.randint(1, 5, (64,), generator=G)
UNLABELLED = tuple((Trained(kind), CLEAN, NOISE, TIMES, ALPHA, SIGMA) for kind in ("v", "eps", "x0", "flow"))

EXERCISES = {
    "03.1": Exercise(
        "a loss that stays at 1.0, repaired", 1, 5, repaired, BATCH,
        wrong={
            "one mistake is left: alpha and sigma have T + 1 entries, but the network counts from 0; feed it t − 1":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, eps), t), eps),
            "one mistake is left: another noise is in the state than in the target; it must be the same eps, or "
            "nothing about it can be learned":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, torch.randn_like(eps)), t - 1), eps),
            "both mistakes are still there: the noise in the state is not that of the target, and the time is one too "
            "high": lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, torch.randn_like(eps)), t), eps),
            "now alpha and sigma are one level too low; only what the network is fed counts from 0":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t - 1], s[t - 1], x0, eps), t - 1), eps),
            "the noise went in with sigma², its variance; its amplitude is sigma, the square root of 1 − alpha_bar":
                lambda net, x0, eps, t, a, s: (net(mixed(a[t], s[t] ** 2, x0, eps), t - 1) - eps).square().mean(),
            "alpha[t] has one number per point but was spread over the coordinates: write alpha[t][:, None]":
                lambda net, x0, eps, t, a, s: (net(a[t] * x0 + s[t] * eps, t - 1) - eps).square().mean(),
            "the answer is compared with the noisy point; the target is the noise in it, eps":
                off(lambda x, out, x0, eps: out - x),
            "the answer is compared with the clean point; the target of the ε-loss is the noise":
                off(lambda x, out, x0, eps: out - x0),
            "the network was given the clean point: there is no noise in it to be found":
                lambda net, x0, eps, t, a, s: (net(x0, t - 1) - eps).square().mean(),
            "the target was scaled by sigma: the network estimates the unit noise eps, not the share of it in x":
                lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, eps), t - 1), s[t][:, None] * eps),
            "the target is another noise; it must be the eps of the state, or nothing about it can be learned":
                off(lambda x, out, x0, eps: out - torch.randn_like(eps)),
            "fresh noise is drawn; take the eps that is given, for the state and as the target":
                lambda net, x0, eps, t, a, s: repaired(net, x0, torch.randn_like(eps), t, a, s),
            "the number is right, but nothing leads back from it to the weights, and no network learns: leave out "
            ".item(), .detach() and no_grad, and return the tensor": lambda *row: repaired(*row).detach(),
            "this adds up the coordinates, so it is D times too large: average over them as well":
                lambda *row: 2 * repaired(*row),
            "this adds up everything; average over points and coordinates": lambda *row: 4 * repaired(*row),
            "this is the root of the mean square; the loss is the mean square itself":
                lambda *row: repaired(*row).sqrt(),
            "the differences are not squared, they are taken without their sign":
                lambda net, x0, eps, t, a, s: (net(mixed(a[t], s[t], x0, eps), t - 1) - eps).abs().mean(),
        },
        also=(lambda net, x0, eps, t, a, s: F.mse_loss(net(mixed(a[t], s[t], x0, eps), t - 1), eps),
              lambda net, x0, eps, t, a, s: sum(
                  (net(a[i] * x[None] + s[i] * e[None], i[None] - 1)[0] - e).pow(2).sum() / 2 for x, e, i in
                  zip(x0, eps, t)) / len(t))),
    "03.2": Exercise(
        "the best multiple of x, and its loss", 2, 10, best_multiple, LEVELS,
        wrong={
            "1/sigma would be right if x were nothing but noise; part of x is data, so answer less":
                lambda a, s, d: (1 / s, (a * d / s) ** 2),
            "this is the multiple that guesses the clean point, alpha·ς²/(…); the noise in x has the amplitude sigma":
                lambda a, s, d: (a * d**2 / (a**2 * d**2 + s**2), s**2 / (a**2 * d**2 + s**2)),
            "the gain is right, and the loss is what is left: 1 minus what you have":
                lambda a, s, d: (best_multiple(a, s, d)[0], s**2 / (a**2 * d**2 + s**2)),
            "width is the deviation of the data, and its square enters the variance of x: alpha²·width² + sigma²":
                lambda a, s, d: (s / (a**2 * d + s**2), a**2 * d / (a**2 * d + s**2)),
            "this is right for width 1 only; the variance of x is alpha²·width² + sigma²": lambda a, s, d: (s, a**2),
            "the gain is right, but this is the root of the loss; leave it squared":
                lambda a, s, d: (best_multiple(a, s, d)[0], best_multiple(a, s, d)[1].sqrt()),
            "the two are swapped: first the gain, then the loss": lambda *row: best_multiple(*row)[::-1],
        },
        also=(lambda a, s, d: (1 / (s + (a * d) ** 2 / s), 1 / (1 + (s / (a * d)) ** 2)),
              lambda a, s, d: (lambda c: (c, (1 - c * s) ** 2 + (c * a * d) ** 2))(s / (a * a * d * d + s * s)))),
    "03.3": Exercise(
        "the loss of k times the right answer", 2, 10, loss_of_multiple,
        tuple((k, best) for k, best in ((2.0, 0.3), (0.0, 0.3), (-1.0, 0.3), (0.5, 0.8), (1.0, 0.1), (1.5, 0.02))),
        wrong={
            "the answer 0 (k = 0) costs 1, not this: only the excess is scaled, by (k − 1)², not the optimum by k²":
                lambda k, best: k**2 * best,
            "the excess is (k − 1)² times the mean square of the perfect answer, and that is not 1 but 1 − optimum, by "
            "(3.5)": lambda k, best: best + (k - 1) ** 2,
            "the mean square of the perfect answer is 1 − optimum, by (3.5), not the optimum":
                lambda k, best: best + (k - 1) ** 2 * best,
            "this is the excess alone; (3.6) adds the optimum": lambda k, best: (k - 1) ** 2 * (1 - best),
            "the excess is a square, so k and 2 − k must cost the same; (k − 1) is not squared":
                lambda k, best: best + abs(k - 1) * (1 - best),
            "the excess compares k·E[eps|x] with E[eps|x], so it goes with (k − 1)², not with k²":
                lambda k, best: best + k**2 * (1 - best),
            "this forgets the mixed term: E[eps·E[eps|x]] is not 0 but the mean square of E[eps|x]":
                lambda k, best: 1 + k**2 * (1 - best),
        },
        also=(lambda k, best: 1 - (2 * k - k * k) * (1 - best),
              lambda k, best: 1 - 2 * k * (1 - best) + k**2 * (1 - best))),
    "03.4": Exercise(
        "a network without a label", 2, 15, kind_of, UNLABELLED,
        wrong={
            "all but v are found: v is alpha·eps − sigma·x0, in this order and with this sign":
                nearest(lambda *row: four(*row) | {"v": -four(*row)["v"]}),
            "all but flow are found: flow is eps − x0, away from the data":
                nearest(lambda *row: four(*row) | {"flow": -four(*row)["flow"]}),
            "this is the target with the largest difference; the network was trained for the nearest one":
                nearest(four, pick=max),
            "the network counts from 0: feed it t − 1": nearest(four, fed=lambda t: t),
            "this is always eps, as of Stable Diffusion 1; look at what the network answers": lambda *row: "eps",
            "return the name, a string, not the number of the smallest loss":
                lambda net, x0, eps, t, a, s: min((net(mixed(a[t], s[t], x0, eps), t - 1) - each).square().mean()
                                                  for each in four(x0, eps, a[t][:, None], s[t][:, None]).values()),
        },
        also=(lambda net, x0, eps, t, a, s: (lambda out: sorted(
            (((out - each) ** 2).sum().item(), kind) for kind, each in
            four(x0, eps, a[t][:, None], s[t][:, None]).items())[0][1])(net(mixed(a[t], s[t], x0, eps), t - 1)),)),
}

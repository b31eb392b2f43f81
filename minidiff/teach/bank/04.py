"""Exercises of notebook 04, DDPM and DDIM."""
from itertools import pairwise

import torch

from minidiff.schedule import Level
from minidiff.teach.check import Exercise


def repaired(denoise, x, times, alpha, sigma):
    """Each pass goes to the next time of the list, the last one to the clean end, t = 0."""
    for t, t1 in zip(times, [*times[1:], 0]):
        x0, eps = denoise(x, t)
        x = alpha[t1] * x0 + sigma[t1] * eps
    return x


def factor(width, alpha, sigma, alpha1, sigma1):
    """alpha' times the factor of the guess of x0, alpha·width²/V, plus sigma' times that of the noise, sigma/V."""
    variance = alpha**2 * width**2 + sigma**2
    return (alpha1 * alpha * width**2 + sigma1 * sigma) / variance


def to_noise(denoise, x, levels):
    """DDIM's step, with the next level the noisier one."""
    for now, nxt in zip(levels, levels[1:]):
        x0, eps = denoise(x, now)
        x = nxt.alpha * x0 + nxt.sigma * eps
    return x


def clipped_pair(x, eps, alpha, sigma):
    """The guess at x0, clipped to [−1, 1], and the noise that it leaves in x."""
    x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
    return x0, (x - alpha * x0) / sigma


def with_minimum(x, eps, alpha, sigma):
    x0 = torch.minimum(torch.maximum(x / alpha - sigma / alpha * eps, torch.tensor(-1.0)), torch.tensor(1.0))
    return [x0, x / sigma - alpha / sigma * x0]


def over(pairs, guess=lambda x0, eps: (x0, eps)):
    """A wrong loop: other pairs of times, another pair of guesses."""
    def wrong(denoise, x, times, alpha, sigma):
        for t, t1 in pairs(times):
            x0, eps = guess(*denoise(x, t))
            x = alpha[t1] * x0 + sigma[t1] * eps
        return x
    return wrong


def upwards(told=lambda now, nxt: now, mix=lambda x0, eps, now, nxt: nxt.alpha * x0 + nxt.sigma * eps):
    """A wrong way up: another level told to the denoiser, another mixture."""
    def wrong(denoise, x, levels):
        for now, nxt in pairwise(levels):
            x = mix(*denoise(x, told(now, nxt)), now, nxt)
        return x
    return wrong


def downwards(denoise, x, levels):
    return to_noise(denoise, x, levels[::-1])


def timed(x, t):
    """Stands for a denoiser that is told a time: not linear, and its two guesses do not fit by chance."""
    return torch.tanh(x + 0.01 * t), torch.sin(2 * x - 0.02 * t)


def at_level(x, level):
    """The same, told a level; the pair fits the state."""
    eps = torch.tanh(x + level.sigma)
    return (x - level.sigma * eps) / level.alpha, eps


X, EPS = (torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
ALPHA = torch.linspace(1, 0.1, 101)
SIGMA = (1 - ALPHA**2).sqrt()
RUNS = tuple((timed, X, times, ALPHA, SIGMA) for times in ([100, 80, 60, 40, 20], [90, 31, 7], [50]))
WIDTHS = ((0.5, 0.6, 0.8, 0.8, 0.6), (2.0, 0.28, 0.96, 0.5, 0.75**0.5), (0.1, 0.96, 0.28, 1.0, 0.0),
          (1.0, 0.6, 0.8, 1.0, 0.0))
RISING = [Level(10.0 * i, (1 - s * s) ** 0.5, s) for i, s in enumerate((0.1, 0.3, 0.6, 0.8, 0.96))]
CLIMBS = tuple((at_level, X, levels) for levels in (RISING, RISING[::2], RISING[1:3]))
STATES = (2 * X, EPS, 0.6, 0.8), (X, 2 * EPS, 0.28, 0.96)

EXERCISES = {
    "04.1": Exercise(
        "the commonest bug, repaired", 2, 10, repaired, RUNS,
        wrong={
            "this is the broken loop: it visits every 20th time and goes down by one each":
                over(lambda times: [(t, t - 1) for t in times]),
            "the last pass is missing: after the last time of the list comes the clean end, t = 0":
                over(lambda times: list(zip(times, times[1:]))),
            "the last pass goes from t to t − 1; nothing comes after it, so it must go to 0":
                over(lambda times: list(zip(times, [*times[1:], times[-1] - 1]))),
            "the amplitudes of the time you stand at give the same state again; take those of the next time":
                over(lambda times: [(t, t) for t in times]),
            "every pass goes straight to the clean end: that is a jump, not a walk":
                over(lambda times: [(t, 0) for t in times]),
            "the denoiser is told the time you are going to; tell it the one you stand at":
                lambda denoise, x, times, a, s: over(lambda times: [(t1, t1) for t1 in [*times[1:], 0]])(
                    denoise, x, times, a, s),
            "the two guesses are swapped: denoise returns (x0, eps)":
                over(lambda times: list(zip(times, [*times[1:], 0])), lambda x0, eps: (eps, x0)),
            "the result is the state at t = 0, not the list of all states": lambda *row: [repaired(*row)],
        },
        also=(lambda denoise, x, times, a, s: over(lambda times: [*pairwise([*times, 0])])(denoise, x, times, a, s),)),
    "04.2": Exercise(
        "the factor of DDIM's step", 2, 10, factor, WIDTHS,
        wrong={
            "this is the factor of the guess of x0 alone; sigma'·eps, with eps = sigma·x/V, comes on top":
                lambda d, a, s, a1, s1: a1 * a * d**2 / (a**2 * d**2 + s**2),
            "this is the factor of the noise alone; alpha' times the guess of x0 comes on top":
                lambda d, a, s, a1, s1: s1 * s / (a**2 * d**2 + s**2),
            "width is a deviation: its square is the variance of the data":
                lambda d, a, s, a1, s1: (a1 * a * d + s1 * s) / (a**2 * d + s**2),
            "this is how much wider the state should become, √(V'/V); in long steps DDIM falls short of it":
                lambda d, a, s, a1, s1: ((a1**2 * d**2 + s1**2) / (a**2 * d**2 + s**2)) ** 0.5,
            "this is right for width 1 only, where V = 1": lambda d, a, s, a1, s1: a1 * a + s1 * s,
            "the old amplitudes give x again, factor 1; mix with alpha' and sigma'": lambda d, a, s, a1, s1: 1.0,
            "the guess of x0 is (x − sigma·eps)/alpha, which is alpha·width²/V times x; here it is 1/alpha times x":
                lambda d, a, s, a1, s1: a1 / a + s1 * s / (a**2 * d**2 + s**2),
            "this forgets to divide by the variance of the state, V = alpha²·width² + sigma²":
                lambda d, a, s, a1, s1: a1 * a * d**2 + s1 * s,
        },
        also=(lambda d, a, s, a1, s1: a1 / a + (s1 - a1 * s / a) * s / (a**2 * d**2 + s**2),)),
    "04.3": Exercise(
        "from a picture to its noise", 2, 15, to_noise, CLIMBS,
        wrong={
            "this walks down: the levels rise already, take them as they come": downwards,
            "this gives x again: ask at the level you stand at, and mix with the amplitudes of the next one":
                upwards(told=lambda now, nxt: nxt),
            "fresh noise is drawn: then the way down does not lead back; keep the guessed noise":
                upwards(mix=lambda x0, eps, now, nxt: nxt.alpha * x0 + nxt.sigma * torch.randn_like(eps)),
            "this is the last guess of the noise; the state at the last level is asked for":
                lambda denoise, x, levels: denoise(upwards()(denoise, x, levels[:-1]), levels[-2])[1],
            "the two guesses are swapped: denoise returns (x0, eps)":
                upwards(mix=lambda x0, eps, now, nxt: nxt.alpha * eps + nxt.sigma * x0),
            "one jump from the first level to the last; ask again at every level on the way":
                lambda denoise, x, levels: to_noise(denoise, x, [levels[0], levels[-1]]),
        },
        also=(upwards(),)),
    "04.4": Exercise(
        "the clipped pair", 2, 10, clipped_pair, STATES,
        wrong={
            "the old eps is kept: work it out again from x and the clipped x0, or the two no longer add up to x":
                lambda x, e, a, s: (((x - s * e) / a).clamp(-1, 1), e),
            "nothing is clipped": lambda x, e, a, s: ((x - s * e) / a, e),
            "the state is clipped here; it is noisy and may be large: clip the guess of x0":
                lambda x, e, a, s: ((x.clamp(-1, 1) - s * e) / a, e),
            "eps is clipped too; it is noise and has no range": lambda x, e, a, s: (
                clipped_pair(x, e, a, s)[0], clipped_pair(x, e, a, s)[1].clamp(-1, 1)),
            "clip to [−1, 1], the range of the pixels here, not to [0, 1]": lambda x, e, a, s: (
                ((x - s * e) / a).clamp(0, 1), (x - a * ((x - s * e) / a).clamp(0, 1)) / s),
            "clipped before the division by alpha: the guess is (4.1) as a whole": lambda x, e, a, s: (
                (x - s * e).clamp(-1, 1) / a, (x - (x - s * e).clamp(-1, 1)) / s),
            "x0 is not scaled by alpha when eps is worked out: what it puts into the state is alpha·x0":
                lambda x, e, a, s: (clipped_pair(x, e, a, s)[0], (x - clipped_pair(x, e, a, s)[0]) / s),
            "eps is not divided by sigma": lambda x, e, a, s: (
                clipped_pair(x, e, a, s)[0], s * clipped_pair(x, e, a, s)[1]),
            "missing square root: eps is divided by sigma, not by its square, 1 − alpha_bar": lambda x, e, a, s: (
                clipped_pair(x, e, a, s)[0], clipped_pair(x, e, a, s)[1] / s),
            "the order is (x0, eps)": lambda *row: clipped_pair(*row)[::-1],
            "this is x0 alone; eps is asked for too": lambda *row: clipped_pair(*row)[0],
            "this squeezes all guesses together; clipping leaves those inside [−1, 1] as they are":
                lambda x, e, a, s: (((x - s * e) / a).tanh(), (x - a * ((x - s * e) / a).tanh()) / s),
        },
        also=(with_minimum,)),
}

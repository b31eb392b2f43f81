"""Exercises of notebook 04, DDPM and DDIM."""
import math

import torch

from minidiff.teach.check import Exercise


def ancestral_step(x, eps, z, beta, sigma, sigma1):
    """DDPM's step: (x − beta/sigma·eps)/√(1 − beta) + sigma1/sigma·√beta·z."""
    mean = (x - beta / sigma * eps) / math.sqrt(1 - beta)
    return mean + sigma1 / sigma * math.sqrt(beta) * z


def ddim_step(x, eps, alpha, sigma, alpha1, sigma1):
    """DDIM's step without fresh noise: the guess at x0 and the estimated noise, mixed for the next level."""
    x0 = (x - sigma * eps) / alpha
    return alpha1 * x0 + sigma1 * eps


def fresh(alpha, sigma, alpha1, sigma1, eta):
    """The standard deviation of DDIM's fresh noise, w = eta·sigma1·√(1 − r²)."""
    r = sigma1 * alpha / (alpha1 * sigma)
    return eta * sigma1 * math.sqrt(1 - r * r)


def clipped_pair(x, eps, alpha, sigma):
    """The guess at x0, clipped to [−1, 1], and the noise that it leaves in x."""
    x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
    return x0, (x - alpha * x0) / sigma


def through_guess(x, eps, z, beta, sigma, sigma1):
    """The posterior of x0 and x, with the guess for x0."""
    alpha = math.sqrt(1 - sigma**2)
    alpha1 = alpha / math.sqrt(1 - beta)
    x0 = (x - sigma * eps) / alpha
    mean = (alpha1 * beta * x0 + math.sqrt(1 - beta) * sigma1**2 * x) / sigma**2
    return mean + math.sqrt(sigma1**2 * beta / sigma**2) * z


def by_ratio(x, eps, alpha, sigma, alpha1, sigma1):
    return alpha1 / alpha * x + (sigma1 - alpha1 * sigma / alpha) * eps


def by_beta(alpha, sigma, alpha1, sigma1, eta):
    """DDIM's equation 16: eta·√((1 − ᾱ')/(1 − ᾱ))·√(1 − ᾱ/ᾱ')."""
    return eta * math.sqrt(sigma1**2 / sigma**2) * math.sqrt(1 - alpha**2 / alpha1**2)


def with_minimum(x, eps, alpha, sigma):
    x0 = torch.minimum(torch.maximum(x / alpha - sigma / alpha * eps, torch.tensor(-1.0)), torch.tensor(1.0))
    return [x0, x / sigma - alpha / sigma * x0]


def step_of(deviation):
    """An ancestral step with another standard deviation of the noise."""
    return lambda x, e, z, b, s, s1: ancestral_step(x, e, 0 * z, b, s, s1) + deviation(b, s, s1) * z


X, EPS, Z = (torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
STEPS = (X, EPS, Z, 0.36, 0.8, 0.4375**0.5), (X, EPS, Z, 0.05, 0.9, 0.8**0.5), (X, EPS, Z, 0.04, 0.2, 0.0)
PAIRS = (X, EPS, 0.6, 0.8, 0.8, 0.6), (X, EPS, 0.28, 0.96, 0.5, 0.75**0.5), (X, EPS, 0.96, 0.28, 1.0, 0.0)
LEVELS = (0.6, 0.8, 0.8, 0.6, 1.0), (0.28, 0.96, 0.6, 0.8, 0.5), (0.6, 0.8, 0.96, 0.28, 0.0), (0.8, 0.6, 1.0, 0.0, 1.0)
STATES = (2 * X, EPS, 0.6, 0.8), (X, 2 * EPS, 0.28, 0.96)

EXERCISES = {
    "04.1": Exercise(
        "the ancestral step", 1, 5, ancestral_step, STEPS,
        wrong={
            "beta instead of the posterior variance: (4.3) has the factor sigma1²/sigma² too, which also turns the "
            "noise off on the last step": step_of(lambda b, s, s1: math.sqrt(b)),
            "noise is added on the very last step, where sigma1 = 0: by (4.3) it is 0 there, and no later step could "
            "take it away": step_of(lambda b, s, s1: (s1 / s if s1 else 1.0) * math.sqrt(b)),
            "missing square root: the noise is scaled by its standard deviation, √ of (4.3), not by the variance":
                step_of(lambda b, s, s1: s1**2 / s**2 * b),
            "the root goes over all of (4.3): beside √beta stands sigma1/sigma, not its square, 1 − alpha_bar without "
            "its root": step_of(lambda b, s, s1: s1**2 / s**2 * math.sqrt(b)),
            "the ratio is upside down: it is sigma1/sigma, the smaller over the larger":
                step_of(lambda b, s, s1: s / s1 * math.sqrt(b)),
            "now and next are swapped: sigma belongs to x, sigma1 to the next state":
                lambda x, e, z, b, s, s1: ancestral_step(x, e, z, b, s1, s),
            "this is the mean alone; the fresh noise is missing": step_of(lambda b, s, s1: 0.0),
            "eps is scaled by beta/sigma², as if 1 − alpha_bar were its root: it is beta/sigma":
                lambda x, e, z, b, s, s1: ancestral_step(x, e / s, z, b, s, s1),
            "eps is scaled by beta/sigma, not by √beta, which is the noise that the step forward added":
                lambda x, e, z, b, s, s1: (x - math.sqrt(b) * e) / math.sqrt(1 - b) + s1 / s * math.sqrt(b) * z,
            "eps is scaled by beta/sigma, not by beta alone":
                lambda x, e, z, b, s, s1: ancestral_step(x, s * e, z, b, s, s1),
            "wrong sign: the estimated noise is taken away, not added":
                lambda x, e, z, b, s, s1: ancestral_step(x, -e, z, b, s, s1),
            "brackets: √(1 − beta) divides all of x − beta/sigma·eps, not x alone":
                lambda x, e, z, b, s, s1: x / math.sqrt(1 - b) - b / s * e + s1 / s * math.sqrt(b) * z,
            "alpha_bar for alpha: the state is divided by √(1 − beta), what one step shrank, not by all of "
            "√(1 − sigma²)": lambda x, e, z, b, s, s1: (x - b / s * e) / math.sqrt(1 - s * s) + s1 / s * b**0.5 * z,
            "this shrinks the state once more: the step forward multiplied by √(1 − beta), so divide by it":
                lambda x, e, z, b, s, s1: (x - b / s * e) * math.sqrt(1 - b) + s1 / s * b**0.5 * z,
            "missing square root: divide by √(1 − beta), not by 1 − beta":
                lambda x, e, z, b, s, s1: (x - b / s * e) / (1 - b) + s1 / s * b**0.5 * z,
            "this takes away all the noise that is in the state, sigma·eps; one step takes away beta/sigma·eps":
                lambda x, e, z, b, s, s1: (x - s * e) / math.sqrt(1 - b) + s1 / s * b**0.5 * z,
            "the fresh noise is divided by √(1 − beta) too; only the first part is": lambda x, e, z, b, s, s1:
                (x - b / s * e + s1 / s * b**0.5 * z) / math.sqrt(1 - b),
        },
        also=(through_guess, step_of(lambda b, s, s1: math.sqrt(s1**2 / s**2 * b)))),
    "04.2": Exercise(
        "the DDIM step", 1, 5, ddim_step, PAIRS,
        wrong={
            "missing square root: the noise is scaled by sigma1, not by its square, 1 − alpha_bar":
                lambda x, e, a, s, a1, s1: a1 * (x - s * e) / a + s1**2 * e,
            "in the guess of x0 the noise is scaled by sigma, not by its square, 1 − alpha_bar":
                lambda x, e, a, s, a1, s1: a1 * (x - s * s * e) / a + s1 * e,
            "alpha_bar for alpha: the guess is scaled by alpha1, not by its square":
                lambda x, e, a, s, a1, s1: a1**2 * (x - s * e) / a + s1 * e,
            "the guess is scaled by alpha1, of the next state, not by alpha":
                lambda x, e, a, s, a1, s1: x - s * e + s1 * e,
            "alpha_bar for alpha: the guess is divided by alpha, not by its square":
                lambda x, e, a, s, a1, s1: a1 * (x - s * e) / a**2 + s1 * e,
            "the guess of x0 is not divided by alpha, see (4.1)":
                lambda x, e, a, s, a1, s1: a1 * (x - s * e) + s1 * e,
            "wrong sign: to get x0, take the noise away": lambda x, e, a, s, a1, s1: a1 * (x + s * e) / a + s1 * e,
            "this is the guess of x0 itself, not a state: mix it with the noise by (4.5)":
                lambda x, e, a, s, a1, s1: (x - s * e) / a,
            "the noise is gone: a state at the next level still holds sigma1·eps":
                lambda x, e, a, s, a1, s1: a1 * (x - s * e) / a,
            "the noise is as strong as before: it is sigma1·eps now": lambda x, e, a, s, a1, s1:
                a1 * (x - s * e) / a + s * e,
            "this mixes with the old amplitudes, which gives x again; take alpha1 and sigma1":
                lambda x, e, a, s, a1, s1: a * ((x - s * e) / a) + s * e,
            "now and next are swapped: the state has alpha and sigma, the result alpha1 and sigma1":
                lambda x, e, a, s, a1, s1: a * (x - s1 * e) / a1 + s * e,
        },
        also=(by_ratio,)),
    "04.3": Exercise(
        "the fresh noise of DDIM", 1, 5, fresh, LEVELS,
        wrong={
            "this is the variance: w is the standard deviation": lambda *row: fresh(*row) ** 2,
            "1 − r² stands under a root": lambda a, s, a1, s1, eta: eta * s1 * (1 - (s1 * a / (a1 * s)) ** 2),
            "r is squared under the root": lambda a, s, a1, s1, eta: eta * s1 * math.sqrt(1 - s1 * a / (a1 * s)),
            "eta stands outside of the root": lambda a, s, a1, s1, eta: math.sqrt(eta) * fresh(a, s, a1, s1, 1.0),
            "eta is not squared: w is a standard deviation, eta² belongs to w²":
                lambda a, s, a1, s1, eta: eta**2 * fresh(a, s, a1, s1, 1.0),
            "r is upside down: it is the smaller noise-to-signal ratio, after the step, over the larger, before it":
                lambda a, s, a1, s1, eta: eta * s1 * math.sqrt(1 - (a1 * s / (s1 * a)) ** 2),
            "eta is missing": lambda a, s, a1, s1, eta: fresh(a, s, a1, s1, 1.0),
            "sigma1 in front is missing": lambda a, s, a1, s1, eta: eta * math.sqrt(1 - (s1 * a / (a1 * s)) ** 2),
            "beta instead of the posterior variance: the factor in front is sigma1, of the next level, not sigma; that "
            "also turns the noise off on the last step":
                lambda a, s, a1, s1, eta: eta * s * math.sqrt(1 - (s1 * a / (a1 * s)) ** 2),
            "r is the ratio of sigma1/alpha1 to sigma/alpha; the alphas are missing":
                lambda a, s, a1, s1, eta: eta * s1 * math.sqrt(1 - (s1 / s) ** 2),
            "missing square root: sigma1²/sigma² beside √beta should be sigma1/sigma, 1 − alpha_bar under its root":
                lambda a, s, a1, s1, eta: eta * s1**2 / s**2 * math.sqrt(1 - (a / a1) ** 2),
            "this is r, or eta times it; (4.7) goes on": lambda a, s, a1, s1, eta: eta * s1 * a / (a1 * s),
            "this is what is left for the old noise, √(sigma1² − w²); w is asked for":
                lambda *row: math.sqrt(row[3] ** 2 - fresh(*row) ** 2),
        },
        also=(by_beta,)),
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

"""Exercises of notebook 02, going back exactly."""
import math

import torch

from minidiff.teach.check import Exercise


def posterior_of(x, x0, alpha, sigma, alpha1, sigma1):
    """Mean and variance of the state at (alpha1, sigma1), given the noisier x at (alpha, sigma) and the clean x0."""
    ratio = alpha / alpha1
    beta = 1 - ratio**2
    variance = 1 / (ratio**2 / beta + 1 / sigma1**2)
    return variance * (ratio * x / beta + alpha1 * x0 / sigma1**2), variance


def ideal_guess(x, data, alpha, sigma):
    """The average of the data, weighted by how well each of them explains the noisy state."""
    far = (x[:, None] - alpha * data).square().sum(2)  # (B, N)
    return torch.softmax(-far / (2 * sigma**2), dim=1) @ data


def eps_weight(alpha, sigma, alpha1, sigma1, v):
    """The factor that turns |eps error|² into nats, for the step from (alpha, sigma) to (alpha1, sigma1)."""
    on_x0 = alpha1 * (1 - (alpha / alpha1) ** 2) / sigma**2
    return on_x0**2 * sigma**2 / (2 * v * alpha**2)


def guess_of(x, score, alpha, sigma):
    """Tweedie's formula, solved for the guess of x0."""
    return (x + sigma**2 * score) / alpha


def weighted(x, data, weights):
    return torch.softmax(weights, dim=1) @ data


def far(x, data, alpha=1.0):
    return (x[:, None] - alpha * data).square().sum(2)


def one_by_one(x, data, alpha, sigma):
    rows = []
    for each in x:
        p = torch.exp(-(each - alpha * data).square().sum(1) / (2 * sigma**2))
        rows.append((p[:, None] * data).sum(0) / p.sum())
    return torch.stack(rows)


def gauss(x, x0, likelihood, prior, a, s, a1, s1):
    """A posterior with these precisions, for the wrong answers."""
    ratio, variance = a / a1, 1 / (likelihood + prior)
    return variance * (likelihood * x / ratio + prior * a1 * x0), variance


def parts(a, a1, s1):
    """ratio, beta and the two right precisions."""
    ratio = a / a1
    beta = 1 - ratio**2
    return ratio, beta, ratio**2 / beta, 1 / s1**2


def without_alpha1(x, x0, a, s, a1, s1):
    ratio, beta, likelihood, prior = parts(a, a1, s1)
    return (ratio * x / beta + x0 / s1**2) / (likelihood + prior), 1 / (likelihood + prior)


def with_alpha(x, x0, a, s, a1, s1):
    return posterior_of(x, x0 * a / a1, a, s, a1, s1)


def inverted(x, x0, a, s, a1, s1):
    ratio = a1 / a
    beta = 1 - ratio**2
    variance = 1 / (ratio**2 / beta + 1 / s1**2)
    return variance * (ratio * x / beta + a1 * x0 / s1**2), variance


def swapped(x, x0, a, s, a1, s1):
    return posterior_of(x0, x, a, s, a1, s1)


def of_the_paper(x, x0, a, s, a1, s1):
    ratio = a / a1
    beta = 1 - ratio**2
    return (ratio * s1**2 * x + a1 * beta * x0) / s**2, beta * s1**2 / s**2


def by_ratios(x, x0, a, s, a1, s1):
    r2 = (s1 * a / (a1 * s)) ** 2
    return r2 * a1 / a * x + a1 * (1 - r2) * x0, s1**2 * (1 - r2)


def with_variance(f):
    """The right mean with another variance, f(beta, right variance, s1)."""
    def wrong(x, x0, a, s, a1, s1):
        mean, variance = posterior_of(x, x0, a, s, a1, s1)
        return mean, f(1 - (a / a1) ** 2, variance, s1)
    return wrong


# from (0.6, 0.8) to (0.8, 0.6) would not do: where sigma = alpha1 and sigma1 = alpha, a wrong formula can be right
STATE = torch.tensor([-2.0, -0.9, 0.2, 1.1, 1.7], dtype=torch.float64)
CLEAN = torch.tensor([0.9, -0.3, 0.5, 0.0, -1.0], dtype=torch.float64)
NEAR, FAR = (0.6, 0.8, 12 / 13, 5 / 13), (0.28, 0.96, 15 / 17, 8 / 17)  # alpha, sigma, alpha1, sigma1
STEPS = (STATE, CLEAN, *NEAR), (STATE, CLEAN, *FAR)
POINTS = torch.tensor([[0.9, -0.3], [-1.1, 0.4], [0.2, 1.0], [-0.5, -0.8]], dtype=torch.float64)
NOISY = torch.tensor([[0.4, 0.1], [-0.6, -0.9], [1.2, -0.2]], dtype=torch.float64)
DATA = (NOISY, POINTS, 0.6, 0.8), (NOISY, POINTS, 0.8, 0.6)
LEVELS = (*NEAR, 0.4), (*FAR, 0.05)
GUESSES = (STATE, CLEAN, 0.6, 0.8), (STATE, CLEAN, 0.96, 0.28)

EXERCISES = {
    "02.1": Exercise(
        "mean and variance of one step back", 2, 15, posterior_of, STEPS,
        wrong={
            "the mean is right, but the variance is beta, that of the step forward: knowing x0 makes it smaller":
                with_variance(lambda beta, variance, s1: beta),
            "the mean is right, but this is the standard deviation; the variance is asked for":
                with_variance(lambda beta, variance, s1: math.sqrt(variance)),
            "the mean is right, but this is 1/variance, the precision: turn it over at the end":
                with_variance(lambda beta, variance, s1: 1 / variance),
            "the mean is right, but the variance is sigma1², that of the state before x was seen":
                with_variance(lambda beta, variance, s1: s1**2),
            "the two states are swapped: x is the noisy one, x0 the clean one": swapped,
            "alpha1 is missing: the second Gaussian has its centre at alpha1·x0, not at x0": without_alpha1,
            "sigma1 is a standard deviation; the precision is 1/sigma1², not 1/sigma1":
                lambda x, x0, a, s, a1, s1: gauss(x, x0, parts(a, a1, s1)[2], 1 / s1, a, s, a1, s1),
            "the first precision is ratio²/beta: dividing by the ratio, to get from x to the state before it, also "
            "widens the Gaussian":
                lambda x, x0, a, s, a1, s1: gauss(x, x0, 1 / parts(a, a1, s1)[1], 1 / s1**2, a, s, a1, s1),
            "the noise of the step is beta = 1 − (alpha/alpha1)²; sigma² is that of all steps up to here":
                lambda x, x0, a, s, a1, s1: gauss(x, x0, (a / a1) ** 2 / s**2, 1 / s1**2, a, s, a1, s1),
            "beta is 1 − ratio², with the square: it is a variance":
                lambda x, x0, a, s, a1, s1: gauss(x, x0, (a / a1) ** 2 / (1 - a / a1), 1 / s1**2, a, s, a1, s1),
            "the ratio is upside down: it is alpha/alpha1, below 1, what a step leaves of the state": inverted,
            "x0 is multiplied by alpha1, the amplitude at the state that is asked for, not by alpha": with_alpha,
            "beta is not sigma² − sigma1²: the step also shrinks the noise that was there; it is 1 − (alpha/alpha1)²":
                lambda x, x0, a, s, a1, s1: gauss(x, x0, (a / a1) ** 2 / (s**2 - s1**2), 1 / s1**2, a, s, a1, s1),
        },
        also=(of_the_paper, by_ratios)),
    "02.2": Exercise(
        "the ideal denoiser of a data set", 2, 15, ideal_guess, DATA,
        wrong={
            "alpha is missing: a noisy state that came from y lies around alpha·y":
                lambda x, y, a, s: weighted(x, y, -far(x, y) / (2 * s**2)),
            "sigma is a standard deviation; divide the squared distance by 2 sigma²":
                lambda x, y, a, s: weighted(x, y, -far(x, y, a) / (2 * s)),
            "the factor 2 is missing: a Gaussian has the squared distance over 2 sigma² in its exponent":
                lambda x, y, a, s: weighted(x, y, -far(x, y, a) / s**2),
            "the minus is missing: far points explain the state worse, not better":
                lambda x, y, a, s: weighted(x, y, far(x, y, a) / (2 * s**2)),
            "the distance should be squared": lambda x, y, a, s: weighted(x, y, -far(x, y, a).sqrt() / (2 * s**2)),
            "this takes the likeliest point alone; average all of them with their weights":
                lambda x, y, a, s: y[far(x, y, a).argmin(1)],
            "the softmax runs over the states; each state shares its weights out among the data":
                lambda x, y, a, s: torch.softmax(-far(x, y, a) / (2 * s**2), dim=0) @ y,
            "this is alpha times the answer: the guess is of the clean picture, not of what is left of it in the state":
                lambda x, y, a, s: a * ideal_guess(x, y, a, s),
        },
        also=(one_by_one,
              lambda x, y, a, s: torch.softmax((a * x @ y.T - a * a * y.square().sum(1) / 2) / s**2, dim=1) @ y)),
    "02.3": Exercise(
        "the weight of the eps loss in the bound", 3, 15, eps_weight, LEVELS,
        wrong={
            "the factor ½ of the KL divergence is missing": lambda a, s, a1, s1, v: 2 * eps_weight(a, s, a1, s1, v),
            "this is the weight of |x0 error|²; an error of eps is alpha/sigma times as large, put that in":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * a**2 / s**2,
            "alpha/sigma is upside down: the error of x0 is sigma/alpha times that of eps":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * (a / s) ** 4,
            "the error of x0 is sigma/alpha times that of eps at the noisier level, where the guess is made; you take "
            "sigma1/alpha1": lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * (s1 * a / (a1 * s)) ** 2,
            "c has alpha1, the amplitude nearer to the data, not alpha":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * (a / a1) ** 2,
            "in c, beta is divided by sigma², the variance at the noisier level, not by sigma1²":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * (s / s1) ** 4,
            "beta is 1 − (alpha/alpha1)², with the square: it is a variance":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) / (1 + a / a1) ** 2,
            "sigma/alpha should be squared: the weight belongs to the squared error":
                lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) * a / s,
            "c should be squared: the weight belongs to the squared error": lambda a, s, a1, s1, v:
                eps_weight(a, s, a1, s1, v) / (a1 * (1 - (a / a1) ** 2) / s**2),
            "v is a variance already: divide by v, not by v²": lambda a, s, a1, s1, v: eps_weight(a, s, a1, s1, v) / v,
            "divide by v, not by its root: v is what stands below the squared distance": lambda a, s, a1, s1, v:
                eps_weight(a, s, a1, s1, v) * math.sqrt(v),
            "v is missing: divide by the variance of the model's step": lambda a, s, a1, s1, v:
                eps_weight(a, s, a1, s1, v) * v,
            "the error is right, its sign is not: a squared distance has a positive weight": lambda a, s, a1, s1, v:
                -eps_weight(a, s, a1, s1, v),
        },
        also=(lambda a, s, a1, s1, v: (1 - (a / a1) ** 2) ** 2 / (2 * v * (a / a1) ** 2 * s**2),
              lambda a, s, a1, s1, v: (a1 * s / a * (1 - (s1 * a / (a1 * s)) ** 2)) ** 2 / (2 * v))),
    "02.4": Exercise(
        "the clean picture that a score believes in", 2, 10, guess_of, GUESSES,
        wrong={
            "alpha is missing: divide by it at the end": lambda x, score, a, s: x + s**2 * score,
            "wrong sign: the score points from the state towards alpha·guess": lambda x, score, a, s:
                (x - s**2 * score) / a,
            "sigma should be squared: the score is a distance divided by a variance": lambda x, score, a, s:
                (x + s * score) / a,
            "sigma² is missing: the score is a distance divided by it": lambda x, score, a, s: (x + score) / a,
            "this is the noise, −sigma·score; the clean picture is asked for": lambda x, score, a, s: -s * score,
            "divide by alpha, not by its square": lambda x, score, a, s: (x + s**2 * score) / a**2,
        },
        also=(lambda x, score, a, s: x / a - (s / a) * (-s * score),)),
}

"""Exercises of notebook 05, samplers are solvers."""
import math

import torch

from minidiff.teach.check import Exercise


def euler_step(x, eps, alpha, sigma, alpha1, sigma1):
    """State x and noise estimate eps, tensors of one shape, at the level (alpha, sigma) -> x' at (alpha1, sigma1)."""
    y, u, u1 = x / alpha, sigma / alpha, sigma1 / alpha1
    return alpha1 * (y + (u1 - u) * eps)


def order_of_the_run(p, first):
    """p, the order with a full past; first, a list, perhaps empty, with each first step's q -> the order of the run."""
    return min([p, *first])


def extrapolated(x0, before, h, h_before):
    """x0 and before, tensors of one shape; h and h_before, numbers -> D, of their shape."""
    return x0 + h / (2 * h_before) * (x0 - before)


def karras_levels(n, high, low, rho):
    """n levels from high to low, evenly spaced in their rho-th root -> a Python list of n numbers."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + i / (n - 1) * (last - first)) ** rho for i in range(n)]


X, EPS = torch.tensor([[1.0, -0.5], [2.0, 0.3]]), torch.tensor([[0.4, 1.2], [-0.7, 0.1]])
STEPS = (X, EPS, 0.6, 0.8, 0.8, 0.6), (X, EPS, 0.28, 0.96, 0.6, 0.8), (X, EPS, 1.0, 5.0, 1.0, 2.0), \
    (X, EPS, 0.6, 0.8, torch.tensor(1.0), torch.tensor(0.0))  # of tensors 1/0 is inf: u upside down gets its sentence
RUNS = (1, []), (2, [2]), (2, [3]), (3, [2, 3]), (4, [2, 3, 4]), (3, [3, 3]), (5, [4, 6]), (3, [5, 2]), \
    (5, [5, 4, 3, 6]), (6, [5, 5])
LINES = (X, EPS, 0.5, 0.25), (X, EPS, 0.2, 0.7), (X, EPS, 0.4, 0.4)
LEVELS = (3, 10.0, 0.1, 7.0), (5, 14.6, 0.03, 7.0), (4, 80.0, 0.002, 3.0)

EXERCISES = {
    "05.1": Exercise(
        "a step of Euler's method from a state x", 2, 10, euler_step, STEPS,
        wrong={
            "the sign is wrong: the step is u' − u, new minus old, and negative on the way to the data":
                lambda x, e, a, s, a1, s1: a1 * (x / a - (s1 / a1 - s / a) * e),
            "this is y', the new state divided by alpha1: multiply by alpha1 to come back to x'":
                lambda x, e, a, s, a1, s1: x / a + (s1 / a1 - s / a) * e,
            "back from y' to x' it is alpha1, the alpha of the new level, that you multiply by":
                lambda x, e, a, s, a1, s1: a * (x / a + (s1 / a1 - s / a) * e),
            "x is used where y belongs: divide the state by alpha first":
                lambda x, e, a, s, a1, s1: a1 * (x + (s1 / a1 - s / a) * e),
            "u is upside down: noise to signal is sigma/alpha":
                lambda x, e, a, s, a1, s1: a1 * (x / a + (a1 / s1 - a / s) * e),
            "u is a ratio of amplitudes, sigma/alpha; this takes the variances":
                lambda x, e, a, s, a1, s1: a1 * (x / a + ((s1 / a1) ** 2 - (s / a) ** 2) * e),
            "this is right only where alpha is 1: the step is that of sigma/alpha, not of sigma":
                lambda x, e, a, s, a1, s1: x + (s1 - s) * e,
            "y is right, but the step is that of u: sigma1/alpha1 − sigma/alpha, not sigma1 − sigma":
                lambda x, e, a, s, a1, s1: a1 * (x / a + (s1 - s) * e),
            "alpha1 multiplies the whole of y', the step (u' − u)·eps too":
                lambda x, e, a, s, a1, s1: a1 * x / a + (s1 / a1 - s / a) * e,
            "alpha1 multiplies the whole of y', the old y too":
                lambda x, e, a, s, a1, s1: x / a + a1 * (s1 / a1 - s / a) * e,
            "this goes all the way to u = 0: the noise of the new level, sigma1·eps, is missing":
                lambda x, e, a, s, a1, s1: a1 * (x - s * e) / a,
        },
        also=(lambda x, e, a, s, a1, s1: a1 * (x - s * e) / a + s1 * e,
              lambda x, e, a, s, a1, s1: a1 / a * x + (s1 - a1 * s / a) * e)),
    "05.2": Exercise(
        "the order of a run with a simple start", 2, 10, order_of_the_run, RUNS,
        wrong={
            "an error of size h^q that is made once stays h^q: only what is made about 1/h times loses a power":
                lambda p, first: min([p, *(q - 1 for q in first)]),
            "the first steps count too: what they do wrong is carried to the end": lambda p, first: p,
            "the many steps after them count too: they leave h^p": lambda p, first: min(first, default=p),
            "each step of the method has an error h^(p+1), but about 1/h of them add up to h^p":
                lambda p, first: min([p + 1, *first]),
            "the sum is as large as its largest part, and for small h that is the one with the smallest power":
                lambda p, first: max([p, *first]),
            "look at every one of the first steps, not only at the very first": lambda p, first: min([p, *first[:1]]),
            "look at every one of the first steps, not only at two of them": lambda p, first: min([p, *first[:2]]),
            "look at every one of the first steps, not only at the very first and the last of them":
                lambda p, first: min([p, *first[:1], *first[-1:]]),
            "look at every one of the first steps, not only at the last": lambda p, first: min([p, *first[-1:]]),
            "the idea is right, but where first is empty min gets a single number and stops: give it a list":
                lambda p, first: min(p, *first),
            "of the first steps the worst counts, the one with the smallest q":
                lambda p, first: min(p, max(first, default=p)),
            "the smallest power is what counts, of the first steps and of p":
                lambda p, first: max(first, default=p),
            "LMS here stops at four values, but the question is about any method: the order may be above 4":
                lambda p, first: min([p, *first, 4]),
        },
        also=(lambda p, first: sorted([*first, p])[0],
              lambda p, first: round(math.log2(sum(2.0 ** (-60 * q) for q in [p, *first])) / -60))),
    "05.3": Exercise(
        "x0 in the middle of the next step", 2, 10, extrapolated, LINES,
        wrong={
            "the ratio is upside down: the change per unit of λ is (x0 − before)/h_before":
                lambda x, b, h, hb: x + hb / (2 * h) * (x - b),
            "this is the value at the end of the step; the one in the middle is asked for, half a step on":
                lambda x, b, h, hb: x + h / hb * (x - b),
            "the sign is wrong: this goes back to what was said before instead of on":
                lambda x, b, h, hb: x - h / (2 * hb) * (x - b),
            "this is right only when both steps are of the same length: the slope is (x0 − before)/h_before":
                lambda x, b, h, hb: x + 0.5 * (x - b),
            "this is the middle of the last step, not of the next": lambda x, b, h, hb: (x + b) / 2,
            "h is missing: slope times half the next step, not slope times a half":
                lambda x, b, h, hb: x + (x - b) / (2 * hb),
        },
        also=(lambda x, b, h, hb: (1 + h / (2 * hb)) * x - h / (2 * hb) * b,
              lambda x, b, h, hb: torch.lerp(b, x, (hb + h / 2) / hb))),
    "05.4": Exercise(
        "levels after Karras et al.", 1, 5, karras_levels, LEVELS,
        wrong={
            "rho is upside down: the levels are even in u^(1/rho), so take the root first and the power at the end":
                lambda n, high, low, rho: karras_levels(n, high, low, 1 / rho),
            "the ends are swapped: the first level is the noisiest": lambda n, *rest: karras_levels(n, *rest)[::-1],
            "the last level is not reached: n levels have n − 1 steps between them, so divide i by n − 1":
                lambda n, *rest: karras_levels(n + 1, *rest)[:-1],
            "one level too many: n levels are asked for, both ends included":
                lambda n, *rest: karras_levels(n + 1, *rest),
            "these are still the roots: raise them to the power rho":
                lambda n, *rest: [u ** (1 / rest[-1]) for u in karras_levels(n, *rest)],
            "these are the right levels, in a tensor or an array: return them as a list, with .tolist()":
                lambda *row: torch.tensor(karras_levels(*row)),
            "this is even in u itself: the steps have to be even in u^(1/rho)":
                lambda n, high, low, rho: karras_levels(n, high, low, 1.0),
            "this is even in log u, what rho without end would give":
                lambda n, high, low, rho: [high * (low / high) ** (i / (n - 1)) for i in range(n)],
        },
        also=(lambda n, high, low, rho: [root ** rho for root in
                                         torch.linspace(high ** (1 / rho), low ** (1 / rho), n).tolist()],
              lambda n, high, low, rho: [((i * low ** (1 / rho) + (n - 1 - i) * high ** (1 / rho)) / (n - 1)) ** rho
                                         for i in range(n)])),
}

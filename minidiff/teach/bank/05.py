"""Exercises of notebook 05, samplers are solvers."""
import math

import torch

from minidiff.teach.check import Exercise


def repaired(slope, y, u, u1):
    """The second slope is asked for where Euler's step ends: there, and at that noise level."""
    first = slope(y, u)
    second = slope(y + (u1 - u) * first, u1)
    return y + (u1 - u) * (first + second) / 2


def order_of_the_run(k, first):
    """k, the order with a full past; first, a list, perhaps empty, with each first step's q -> the order of the run."""
    return min([k, *first])


def two_values(y, eps, before, u, u1, u_before):
    """The line's value in the middle of the step is its mean over the step."""
    middle = eps + (eps - before) / (u - u_before) * (u1 - u) / 2
    return y + (u1 - u) * middle


def exact_path(y, u, u1, width):
    """The cloud has the deviation √(width² + u²), and a point keeps its place in it."""
    return y * math.sqrt((width**2 + u1**2) / (width**2 + u**2))


def curved(y, u):
    """Stands for a network: a slope that is no line in y, nor in u."""
    return torch.tanh(y + 0.5 * u) * (1 + 0.2 * u)


def averaged(second):
    """A wrong Heun: `second(slope, y, u, u1, first)` is the slope that is averaged with the first."""
    return lambda slope, y, u, u1: y + (u1 - u) * (slope(y, u) + second(slope, y, u, u1, slope(y, u))) / 2


def by_weights(y, eps, before, u, u1, u_before):
    d, last = u1 - u, u - u_before
    return y + (d + d * d / (2 * last)) * eps - d * d / (2 * last) * before


X, EPS = torch.tensor([[1.0, -0.5], [2.0, 0.3]]), torch.tensor([[0.4, 1.2], [-0.7, 0.1]])
STEPS = (curved, X, 1.0, 0.6), (curved, EPS, 3.0, 2.0), (curved, X, 0.5, 0.1)
RUNS = (1, []), (2, [2]), (2, [3]), (3, [2, 3]), (4, [2, 3, 4]), (3, [3, 3]), (5, [4, 6]), (3, [5, 2]), \
    (5, [5, 4, 3, 6]), (6, [5, 5])
LINES = (X, EPS, EPS.flip(0), 1.0, 0.7, 1.5), (X, EPS, EPS.flip(1), 0.4, 0.1, 0.5), (X, EPS, EPS.flip(0), 2.0, 1.0, 3.0)
PATHS = (X, 2.0, 0.5, 1.0), (X, 1.0, 0.0, 0.5), (EPS, 0.3, 4.0, 2.0)

EXERCISES = {
    "05.1": Exercise(
        "Heun's method, repaired", 2, 10, repaired, STEPS,
        wrong={
            "this is the broken step: the second slope is asked for at the old noise level u; the look ahead is at u1":
                averaged(lambda f, y, u, u1, first: f(y + (u1 - u) * first, u)),
            "now the place is the old one: look ahead from where Euler's step ends, at u1":
                averaged(lambda f, y, u, u1, first: f(y, u1)),
            "the second slope alone has order 1, as the first alone; take the mean of both":
                lambda f, y, u, u1: y + (u1 - u) * f(y + (u1 - u) * f(y, u), u1),
            "this is Euler's step, order 1": lambda f, y, u, u1: y + (u1 - u) * f(y, u),
            "the slopes are added, not averaged: divide by 2":
                lambda f, y, u, u1: y + (u1 - u) * (f(y, u) + f(y + (u1 - u) * f(y, u), u1)),
            "the sign is wrong: the step is u1 − u, new minus old, and negative on the way to the data":
                lambda f, y, u, u1: y - (u1 - u) * (f(y, u) + f(y - (u1 - u) * f(y, u), u1)) / 2,
            "the look ahead goes back: Euler's step is y + (u1 − u)·slope":
                averaged(lambda f, y, u, u1, first: f(y - (u1 - u) * first, u1)),
            "this starts the averaged step from where Euler's ends; go back to y first":
                lambda f, y, u, u1: repaired(f, y, u, u1) + (u1 - u) * f(y, u),
        },
        also=(lambda f, y, u, u1: 0.5 * (y + (u1 - u) * f(y, u)) + 0.5 * (
            y + (u1 - u) * f(y + (u1 - u) * f(y, u), u1)),)),
    "05.2": Exercise(
        "the order of a run with a simple start", 2, 10, order_of_the_run, RUNS,
        wrong={
            "an error of size δ^q that is made once stays δ^q: only what is made about 1/δ times loses a power":
                lambda k, first: min([k, *(q - 1 for q in first)]),
            "the first steps count too: what they do wrong is carried to the end": lambda k, first: k,
            "the many steps after them count too: they leave δ^k": lambda k, first: min(first, default=k),
            "each step of the method has an error δ^(k+1), but about 1/δ of them add up to δ^k":
                lambda k, first: min([k + 1, *first]),
            "the sum is as large as its largest part, and for small δ that is the one with the smallest power":
                lambda k, first: max([k, *first]),
            "look at every one of the first steps, not only at the very first": lambda k, first: min([k, *first[:1]]),
            "look at every one of the first steps, not only at two of them": lambda k, first: min([k, *first[:2]]),
            "look at every one of the first steps, not only at the very first and the last of them":
                lambda k, first: min([k, *first[:1], *first[-1:]]),
            "look at every one of the first steps, not only at the last": lambda k, first: min([k, *first[-1:]]),
            "the idea is right, but where first is empty min gets a single number and stops: give it a list":
                lambda k, first: min(k, *first),
            "of the first steps the worst counts, the one with the smallest q":
                lambda k, first: min(k, max(first, default=k)),
            "the smallest power is what counts, of the first steps and of k":
                lambda k, first: max(first, default=k),
            "LMS here stops at four values, but the question is about any method: the order may be above 4":
                lambda k, first: min([k, *first, 4]),
        },
        also=(lambda k, first: sorted([*first, k])[0],
              lambda k, first: round(math.log2(sum(2.0 ** (-60 * q) for q in [k, *first])) / -60))),
    "05.3": Exercise(
        "multistep with two values", 2, 15, two_values, LINES,
        wrong={
            "this is Euler's step; the line through both values bends it": lambda y, e, b, u, u1, ub: y + (u1 - u) * e,
            "this is right only when both steps are of one length (3/2, −1/2)":
                lambda y, e, b, u, u1, ub: y + (u1 - u) * (1.5 * e - 0.5 * b),
            "this takes the line's value at the end of the step; its mean over the step is the one in the middle":
                lambda y, e, b, u, u1, ub: y + (u1 - u) * (e + (e - b) / (u - ub) * (u1 - u)),
            "the line is continued backwards: its slope is (eps − before)/(u − u_before)":
                lambda y, e, b, u, u1, ub: y + (u1 - u) * (e - (e - b) / (u - ub) * (u1 - u) / 2),
            "this is the mean of the two values; the line has to be continued past eps":
                lambda y, e, b, u, u1, ub: y + (u1 - u) * (e + b) / 2,
            "this integrates the line from u_before; the step goes from u to u1":
                lambda y, e, b, u, u1, ub: y + (u1 - ub) * (b + (e - b) / (u - ub) * (u1 - ub) / 2),
            "this is the change of y alone; add y": lambda y, *rest: two_values(0 * y, *rest),
        },
        also=(by_weights,)),
    "05.4": Exercise(
        "where the curve goes for Gaussian data", 2, 10, exact_path, PATHS,
        wrong={
            "missing square root: the cloud's deviation is √(width² + u²)":
                lambda y, u, u1, w: y * (w**2 + u1**2) / (w**2 + u**2),
            "upside down: the deviation at u1 goes above, that at u below":
                lambda y, u, u1, w: y * math.sqrt((w**2 + u**2) / (w**2 + u1**2)),
            "variances add, deviations do not: √(width² + u²), not width + u":
                lambda y, u, u1, w: y * (w + u1) / (w + u),
            "this is one step of Euler's method; the exact solution bends":
                lambda y, u, u1, w: y + (u1 - u) * u * y / (w**2 + u**2),
            "the width of the data is missing: with noise alone the cloud would shrink to a point":
                lambda y, u, u1, w: y * u1 / u,
            "this is the average of the data possible at y; the path goes to the place of the same rank":
                lambda y, u, u1, w: y * w**2 / (w**2 + u**2),
            "width is a deviation; its square is added to u²":
                lambda y, u, u1, w: y * math.sqrt((w + u1**2) / (w + u**2)),
        },
        also=(lambda y, u, u1, w: y / math.hypot(w, u) * math.hypot(w, u1),)),
}

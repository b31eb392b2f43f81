"""Exercises of notebook 20, flow matching and diffusion transformers."""
import math

import torch

from minidiff.teach.check import Exercise


def adopted(theirs, x, t):
    """Their clock runs the other way, from 0 to 1, and so does their velocity."""
    return -theirs(x, 1 - t / 1000)


def turned(theirs, x, t):
    return 0.0 - theirs(x, (1000.0 - t) * 1e-3)


def bend(width):
    """The mean of the squared velocity along a path, less the square of the mean velocity 1 − width, for unit noise."""
    sigma = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    way = torch.sqrt((1 - sigma) ** 2 * width**2 + sigma**2)
    velocity = (sigma - (1 - sigma) * width**2) / way
    return ((velocity - (1 - width)) ** 2).mean().item()


def in_closed_form(width):
    return (2 - math.pi / 2) * width


def moving(way, chord=lambda width: 1 - width):
    """A wrong bend: of another way, or from another mean velocity; derivatives by differences."""
    def wrong(width):
        sigma = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        steps = way(sigma, width).diff() * 20_000
        return ((steps - chord(width)) ** 2).mean().item()
    return wrong


def ranked(sigma, width):
    return torch.sqrt((1 - sigma) ** 2 * width**2 + sigma**2)


def score(x, velocity, alpha, sigma, d_alpha, d_sigma):
    """Take x0 out of the two equations; the score is minus the noise over sigma."""
    eps = (alpha * velocity - d_alpha * x) / (alpha * d_sigma - sigma * d_alpha)
    return -eps / sigma


def by_tweedie(x, velocity, alpha, sigma, d_alpha, d_sigma):
    """The other unknown first, then (alpha·x0 − x)/sigma²."""
    x0 = (d_sigma * x - sigma * velocity) / (d_sigma * alpha - sigma * d_alpha)
    return (alpha * x0 - x) / sigma**2


def solved(make):
    """A wrong score: make(x, velocity, alpha, sigma, d_alpha, d_sigma, the right noise, the right x0)."""
    def wrong(x, velocity, alpha, sigma, d_alpha, d_sigma):
        det = alpha * d_sigma - sigma * d_alpha
        eps, x0 = (alpha * velocity - d_alpha * x) / det, (d_sigma * x - sigma * velocity) / det
        return make(x, velocity, alpha, sigma, d_alpha, d_sigma, eps, x0)
    return wrong


def mistake(right, other, patch):
    """Make each mistake on the right picture, and see which gives the other."""
    n = right.shape[-1] // patch
    cut = right.unflatten(2, (n, patch)).unflatten(1, (n, patch))  # (C, h, p, w, p)
    rows = cut.permute(1, 3, 2, 4, 0)  # (h, w, p, p, C)
    made = {"none": cut, "patches": cut.transpose(1, 3), "pixels": cut.transpose(2, 4),
            "channels": rows.reshape(n, n, len(right), patch, patch).permute(2, 0, 3, 1, 4)}
    return next(name for name, each in made.items() if torch.equal(each.flatten(3, 4).flatten(1, 2), other))


def by_patches(right, other, patch):
    """The same by looking at single patches: where is the content of the second one?"""
    if torch.equal(right, other):
        return "none"
    one, two = (picture[:, :patch, patch:2 * patch] for picture in (right, other))
    if torch.equal(two, one.transpose(1, 2)):
        return "pixels"
    return "patches" if torch.equal(other[:, patch:2 * patch, :patch], one) else "channels"


def confused(old, new):
    """A wrong diagnosis: one name in place of another."""
    return lambda *row: new if mistake(*row) == old else mistake(*row)


def renamed(names):
    return lambda *row: names.get(mistake(*row), mistake(*row))


def their_net(x, time):
    """Stands for a network of the other library: not linear, and it looks at the time."""
    return torch.tanh(x + 0.3) * (0.5 + time[:, None]) - time[:, None] ** 2


def cut_wrongly(right, patch, name):
    n = right.shape[-1] // patch
    cut = right.unflatten(2, (n, patch)).unflatten(1, (n, patch))
    if name == "channels":
        cut = cut.permute(1, 3, 2, 4, 0).reshape(n, n, len(right), patch, patch).permute(2, 0, 3, 1, 4)
    elif name != "none":
        cut = cut.transpose(1, 3) if name == "patches" else cut.transpose(2, 4)
    return cut.flatten(3, 4).flatten(1, 2)


X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
V = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
CLOCKS = tuple((their_net, X, torch.tensor(t)) for t in ([0.0, 100.0, 300.0, 750.0, 1000.0], [500.0] * 5, [30.0] * 5))
PATHS = ((X, V, 0.7, 0.3, -1.0, 1.0), (X, V, math.cos(0.5), math.sin(0.5), -math.sin(0.5), math.cos(0.5)),
         (X, V, 0.9, 0.6, -0.4, 2.0))
PICTURES = tuple((right, cut_wrongly(right, patch, name), patch) for right, patch in (
    (torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(2)), 3),
    (torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3)), 4))
    for name in ("patches", "pixels", "channels", "none"))

EXERCISES = {
    "20.1": Exercise(
        "a network from another library", 1, 5, adopted, CLOCKS,
        wrong={
            "the sign is missing: their velocity points from noise to data, ours from data to noise":
                lambda theirs, x, t: theirs(x, 1 - t / 1000),
            "their time runs the other way: noise is at 0, data at 1": lambda theirs, x, t: -theirs(x, t / 1000),
            "neither the clock nor the sign is turned; both must be": lambda theirs, x, t: theirs(x, t / 1000),
            "their times are from 0 to 1: divide by 1000 first": lambda theirs, x, t: -theirs(x, 1 - t),
            "turned, but not divided by 1000: their times end at 1": lambda theirs, x, t: -theirs(x, 1000 - t),
            "this turns a clock from 0 to 999; ours goes to 1000": lambda theirs, x, t: -theirs(x, (999 - t) / 1000),
            "the time is turned after their network has seen it: 1 − velocity is no velocity":
                lambda theirs, x, t: 1 - theirs(x, t / 1000),
            "the state is the same in both; only its time and velocity are turned":
                lambda theirs, x, t: -theirs(-x, 1 - t / 1000),
        },
        also=(turned,)),
    "20.2": Exercise(
        "how much a path must bend", 3, 20, bend, ((0.5,), (1.0,), (2.0,), (0.1,)), rtol=1e-3,
        wrong={
            "with width 1 a path ends where it began, but on the way it comes nearer to 0: it is not straight":
                lambda width: 0.0 if width == 1 else bend(width),
            "this is the mean squared velocity; take away the mean velocity first": moving(ranked, lambda width: 0.0),
            "the straight line from the noise to its goal has bend 0, but it is not the path of the best field":
                lambda width: 0.0,
            "the data's width is missing: this is right for width 1 only": lambda width: 2 - math.pi / 2,
            "width is a deviation; here it is taken for a variance": moving(
                lambda s, width: torch.sqrt((1 - s) ** 2 * width + s**2), lambda width: 1 - width**0.5),
            "this is the root of the mean square; the mean square itself is asked for":
                lambda width: bend(width) ** 0.5,
            "this is twice the bend: along two coordinates, but the data are numbers": lambda width: 2 * bend(width),
            "this measures how far the path is from the straight line, not how far its velocity is from the mean one":
                lambda width: (lambda s: ((ranked(s, width) - (1 - s) * width - s) ** 2).mean().item())(
                    torch.linspace(0, 1, 20_001, dtype=torch.float64)),
            "the mean velocity is the end less the start: from the data, width, to the noise, 1": moving(
                ranked, lambda width: width - 1),
            "this is the bend for a variance-preserving path, √(1 − σ²) in place of 1 − σ": moving(
                lambda s, width: torch.sqrt((1 - s**2) * width**2 + s**2)),
        },
        also=(in_closed_form,)),
    "20.3": Exercise(
        "the score from any velocity", 2, 10, score, PATHS,
        wrong={
            "this is the noise; the score is minus the noise over sigma": solved(lambda *row: row[-2]),
            "the sign: the score points away from the noise": solved(lambda *row: row[-2] / row[3]),
            "the noise is divided by sigma once; sigma² belongs to alpha·x0 − x": solved(
                lambda *row: -row[-2] / row[3] ** 2),
            "this is the guess of x0; solve for the noise": solved(lambda *row: row[-1]),
            "this divides the guess of x0; solve for the noise": solved(lambda *row: -row[-1] / row[3]),
            "this is right on the straight path only, where the two derivatives are −1 and 1":
                lambda x, v, a, s, da, ds: -(x + a * v) / s,
            "the determinant is alpha·dσ − sigma·dα: a minus in the middle": lambda x, v, a, s, da, ds: -(
                a * v - da * x) / (a * ds + s * da) / s,
            "the determinant is missing": lambda x, v, a, s, da, ds: -(a * v - da * x) / s,
            "alpha and sigma have changed places: the noise needs alpha·velocity − dα·x": lambda x, v, a, s, da, ds: -(
                s * v - ds * x) / (a * ds - s * da) / s,
            "minus the velocity over sigma is no score: the velocity holds −x0 too": lambda x, v, a, s, da, ds: -v / s,
        },
        also=(by_tweedie,)),
    "20.4": Exercise(
        "put together wrongly", 2, 10, mistake, PICTURES,
        wrong={
            "a patch that is turned in its place is \"pixels\"; \"patches\" are whole ones at other places":
                renamed({"pixels": "patches", "patches": "pixels"}),
            "equal pictures have no mistake: compare them first": confused("none", "patches"),
            "channels read in the wrong order change the colours; rows and columns alone do not":
                confused("channels", "pixels"),
            "look at which values stand where: with \"patches\" whole patches are unharmed":
                confused("patches", "channels"),
            "with \"pixels\" each patch holds the right values in the right channel, only turned":
                confused("pixels", "channels"),
            "this says the same of every picture": lambda right, other, patch: "patches",
            "the mean colour of each patch stays under \"pixels\"; the patches do not move":
                confused("pixels", "patches"),
        },
        also=(by_patches,)),
}

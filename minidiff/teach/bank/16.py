"""Exercises of notebook 16, editing."""
import torch

from minidiff.editing import slerp
from minidiff.teach.check import Exercise


def remaining(levels, strength):
    """The n + 1 levels from k = n − ⌊n·strength⌋ on, (16.1)."""
    n = len(levels) - 1
    return levels[n - int(n * strength):]


def put_back(x, z0, mask, eps, alpha, sigma):
    """(16.2): (B,C,h,w), the state where mask is 1, the noised z0 where it is 0."""
    return mask * x + (1 - mask) * (alpha * z0 + sigma * eps)


def on_the_sphere(a, b, s):
    """(16.4): (B,C,h,w), each row with its own angle."""
    axes = tuple(range(1, a.ndim))
    norms = (a.square().sum(axes, keepdim=True) * b.square().sum(axes, keepdim=True)).sqrt()
    angle = ((a * b).sum(axes, keepdim=True) / norms).acos()
    return (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin()


def step_up(eps, x, alpha, sigma, alpha1, sigma1):
    """(16.5): (B,D), one step to the noisier level."""
    noise = eps(x, alpha, sigma)
    return alpha1 * (x - sigma * noise) / alpha + sigma1 * noise


def moved(first, own, p):
    """(16.6): (B,heads,N,J), the first prompt's maps word by word, own where a token is new."""
    return torch.where(p < 0, own, first[..., p.clamp(min=0)])


def around(a, b, s, angle):
    return (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin()


def one_angle(a, b, s):
    return around(a, b, s, ((a * b).sum() / (a.norm() * b.norm())).acos())


def angle_of(a, b):
    return torch.cosine_similarity(a.flatten(1), b.flatten(1)).acos().view(-1, *[1] * (a.ndim - 1))


def rescaled(a, b, s):
    line = torch.lerp(a, b, s)
    return line / line.std((1, 2, 3), keepdim=True)


def scattered(first, own, p):
    """The inverse permutation: token p(j) of the result gets token j of the first."""
    out = own.clone()
    for j, i in enumerate(p.tolist()):
        if i >= 0:
            out[..., i] = first[..., j]
    return out


def by_loop(first, own, p):
    return torch.stack([own[..., j] if i < 0 else first[..., i] for j, i in enumerate(p.tolist())], -1)


def curved(x, alpha, sigma):
    return torch.tanh(x + 0.3) * (0.4 + sigma)


G = torch.Generator().manual_seed(0)
LATENTS = torch.randn(3, 2, 4, 5, 6, generator=G)
MASK = (torch.rand(2, 1, 5, 6, generator=G) < 0.4).float()
NOISES = (torch.randn(2, 3, 4, 5, generator=G), torch.randn(2, 3, 4, 5, generator=G) * 1.3 + 0.2)
STATES = torch.randn(3, 2, generator=G)
LOOKS = torch.rand(2, 2, 3, 5, 7, generator=G).softmax(-1)
PLACES = torch.tensor([0, 1, -1, -1, 2, 4, 3])

EXERCISES = {
    "16.1": Exercise(
        "the rest of the grid", 1, 5, remaining,
        ((list(range(10, -1, -1)), 0.3), (list(range(7, -1, -1)), 0.55),
         (list(range(7, -1, -1)), 0.45), ([4.0, 3.0, 2.0, 1.0, 0.0], 1.0)),
        wrong={
            "the wrong way round: strength 1 takes all steps and forgets most of the picture":
                lambda levels, s: levels[int((len(levels) - 1) * s):],
            "off by one: this takes one step less; ⌊n·s⌋ steps need ⌊n·s⌋ + 1 levels":
                lambda levels, s: levels[-int((len(levels) - 1) * s):],
            "off by one: n + 1 levels are n steps; n is len(levels) − 1":
                lambda levels, s: levels[len(levels) - int(len(levels) * s):],
            "off by one: this takes one step more than ⌊n·s⌋":
                lambda levels, s: levels[max(0, len(levels) - 2 - int((len(levels) - 1) * s)):],
            "rounded to the nearest number of steps; (16.1) rounds down":
                lambda levels, s: levels[len(levels) - 1 - round((len(levels) - 1) * s):],
            "rounded up; (16.1) rounds the steps down, not the start":
                lambda levels, s: levels[int((len(levels) - 1) * (1 - s)):],
            "these are the noisy levels, which are left out; the last ones remain":
                lambda levels, s: levels[:int((len(levels) - 1) * s) + 1],
            "these are the right levels in reverse: a run goes down, so noise stays first":
                lambda levels, s: remaining(levels, s)[::-1],
        },
        also=(lambda levels, s: levels[-int((len(levels) - 1) * s) - 1:],)),
    "16.2": Exercise(
        "put the known part back", 2, 10, put_back, ((*LATENTS[:2], MASK, LATENTS[2], 0.8, 0.6),
                                                     (*LATENTS[:2], MASK, LATENTS[2], 0.28, 0.96)),
        wrong={
            "the mask is inverted: 1 is where to paint, there x stays":
                lambda x, z0, m, e, a, s: (1 - m) * x + m * (a * z0 + s * e),
            "the known part is not noised: the network would see a clean part in a noisy picture":
                lambda x, z0, m, e, a, s: m * x + (1 - m) * z0,
            "alpha is missing: the known part is scaled like any state, alpha·z0 + sigma·eps":
                lambda x, z0, m, e, a, s: m * x + (1 - m) * (z0 + s * e),
            "the noise has full strength; at this level it has sigma":
                lambda x, z0, m, e, a, s: m * x + (1 - m) * (a * z0 + e),
            "the noise is missing: alpha·z0 alone is too quiet for this level":
                lambda x, z0, m, e, a, s: m * x + (1 - m) * a * z0,
            "alpha and sigma are exchanged": lambda x, z0, m, e, a, s: m * x + (1 - m) * (s * z0 + a * e),
            "x is noised once more where it is painted; it is at its level already":
                lambda x, z0, m, e, a, s: a * (m * x + (1 - m) * z0) + s * e,
            "all is put back, also where it should be painted": lambda x, z0, m, e, a, s: a * z0 + s * e,
            "added, not put in its place: take x away where the mask is 0":
                lambda x, z0, m, e, a, s: x + (1 - m) * (a * z0 + s * e),
        },
        also=(lambda x, z0, m, e, a, s: torch.where(m > 0, x, a * z0 + s * e),)),
    "16.3": Exercise(
        "interpolation on the sphere", 2, 10, on_the_sphere, ((*NOISES, 0.3), (*NOISES, 0.8)),
        wrong={
            "this is the straight line: in the middle of two noises it has a standard deviation of √½": torch.lerp,
            "the ends are exchanged: s = 0 should give a": lambda a, b, s: on_the_sphere(b, a, s),
            "not divided by sin θ": lambda a, b, s: on_the_sphere(a, b, s) * angle_of(a, b).sin(),
            "one angle for the whole batch; each picture has its own": one_angle,
            "this has the right variance for independent noises, but is not the arc: the angle is not divided evenly":
                lambda a, b, s: (1 - s) ** 0.5 * a + s ** 0.5 * b,
            "a straight line that is rescaled reaches the sphere, but does not divide the angle evenly": rescaled,
            "the straight line over (16.3) has the right variance, but does not divide the angle evenly":
                lambda a, b, s: torch.lerp(a, b, s) / ((1 - s) ** 2 + s ** 2) ** 0.5,
            "the arccosine is missing: cos θ was taken for θ":
                lambda a, b, s: around(a, b, s, angle_of(a, b).cos()),
            "θ is taken for 90 degrees; only in infinitely many dimensions it is":
                lambda a, b, s: around(a, b, s, torch.tensor(torch.pi / 2)),
            "cos θ is not divided by the lengths of a and b":
                lambda a, b, s: around(a, b, s, (a * b).sum((1, 2, 3), keepdim=True).acos()),
            "an angle for each place of the picture; all its numbers are one vector":
                lambda a, b, s: around(a, b, s, torch.cosine_similarity(a, b, dim=1).acos()[:, None]),
        },
        also=(slerp, lambda a, b, s: around(a, b, s, angle_of(a, b)))),
    "16.4": Exercise(
        "one step up", 2, 10, step_up,
        ((curved, STATES, 0.8, 0.6, 0.6, 0.8), (curved, STATES, 0.96, 0.28, 0.9, 0.43589)),
        wrong={
            "the eps of the wrong end: x stands at (alpha, sigma), and is asked about there":
                lambda f, x, a, s, a1, s1: (a1 * (x - s * f(x, a1, s1)) / a + s1 * f(x, a1, s1)),
            "this goes down: alpha, sigma is where x stands, alpha1, sigma1 where it goes":
                lambda f, x, a, s, a1, s1: step_up(f, x, a1, s1, a, s),
            "x0 is not divided by alpha": lambda f, x, a, s, a1, s1: a1 * (x - s * f(x, a, s)) + s1 * f(x, a, s),
            "x0 is taken with the sigma of the new level; x holds sigma·eps":
                lambda f, x, a, s, a1, s1: a1 * (x - s1 * f(x, a, s)) / a + s1 * f(x, a, s),
            "x0 is taken with both amplitudes of the new level": lambda f, x, a, s, a1, s1: x + 0 * f(x, a, s),
            "the noise is put back with the old sigma":
                lambda f, x, a, s, a1, s1: a1 * (x - s * f(x, a, s)) / a + s * f(x, a, s),
            "alpha1 is missing: x0 is scaled at the new level too":
                lambda f, x, a, s, a1, s1: (x - s * f(x, a, s)) / a + s1 * f(x, a, s),
            "noise is added to x; first take out what is in it: x0 = (x − sigma·eps)/alpha":
                lambda f, x, a, s, a1, s1: a1 * x + s1 * f(x, a, s),
            "fresh noise is no inversion: eps is the network's": lambda f, x, a, s, a1, s1: (
                a1 * (x - s * f(x, a, s)) / a + s1 * torch.randn_like(x)),
        },
        also=(lambda f, x, a, s, a1, s1: a1 / a * x + (s1 - a1 * s / a) * f(x, a, s),)),
    "16.5": Exercise(
        "moved attention", 3, 15, moved, ((*LOOKS, PLACES),),
        wrong={
            "new tokens took the first prompt's last token: −1 is no place; they keep their own maps":
                lambda f, o, p: f[..., p],
            "new tokens took the first prompt's token 0; they keep their own maps":
                lambda f, o, p: f[..., p.clamp(min=0)],
            "new tokens are looked at by nobody; they keep their own maps":
                lambda f, o, p: f[..., p.clamp(min=0)] * (p >= 0),
            "p is not used: token j of the second prompt stands for token p(j) of the first, not j":
                lambda f, o, p: torch.where(p < 0, o, f),
            "the wrong way round: p says for each token of the second prompt where to take from": scattered,
            "first and own are exchanged": lambda f, o, p: moved(o, f, p),
            "all maps are the first's, token by token; (16.6) goes word by word": lambda f, o, p: f.clone(),
            "nothing was moved": lambda f, o, p: o.clone(),
            "rescaled to add up to 1; (16.6) does not": lambda f, o, p: (
                moved(f, o, p) / moved(f, o, p).sum(-1, keepdim=True)),
        },
        also=(by_loop,)),
}

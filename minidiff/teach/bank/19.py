"""Exercises of notebook 19, consistency models and LCM."""
import math

import torch

from minidiff.teach.check import Exercise


def widths(width, u, least):
    """The states have the variance width² + u²; each answer multiplies them by its factor of (19.3)."""
    state = math.sqrt(width**2 + u**2)
    return width**2 / state, math.sqrt(width**2 + least**2)


def by_factors(width, u, least):
    ratio = width**2 / (width**2 + u**2)
    return width * ratio**0.5, math.hypot(width, u) * math.sqrt((width**2 + least**2) / (width**2 + u**2))


def fault(x0, x, x1, u, u1):
    """The two states say which noise is in them."""
    if torch.equal(x, x1):
        return "same point"
    if (u1 > u).any():
        return "wrong way"
    same = torch.allclose((x - x0) / u, (x1 - x0) / u1, atol=1e-3)
    return "healthy" if same else "fresh noise"


def by_lines(x0, x, x1, u, u1):
    """The same, asked of the line from x0 to x, on which the neighbour has to lie."""
    if not (x - x1).any():
        return "same point"
    off = (x1 - (x0 + u1 / u * (x - x0))).abs().max()
    return "wrong way" if bool((u1 > u).all()) else "healthy" if off < 1e-3 else "fresh noise"


def scaling_for(share, t, d):
    """share = d²/((k·t)² + d²), solved for k."""
    return d / t * math.sqrt(1 / share - 1)


def by_odds(share, t, d):
    return math.sqrt(d * d * (1 - share) / share) / t


def filled(f, x, us, known, mask, noises):
    """Jump, put back what is known, add noise up to the next level; the end of the last jump gets none."""
    for i, u in enumerate(us[:-1]):
        end = mask * known + (1 - mask) * f(x, u)
        if i < len(noises):
            x = end + math.sqrt(us[i + 1] ** 2 - us[-1] ** 2) * noises[i]
    return end


def by_where(f, x, us, known, mask, noises):
    ends = torch.where(mask > 0, known, f(x, us[0]))
    for u, z in zip(us[1:-1], noises):
        ends = torch.where(mask > 0, known, f(ends + (u * u - us[-1] * us[-1]) ** 0.5 * z, u))
    return ends


def loop(put=lambda end, known, mask, last: mask * known + (1 - mask) * end, size=lambda u, least: math.sqrt(
        u * u - least * least), told=lambda now, nxt: now, base=lambda x, end: end, pick=lambda noises, i: noises[i]):
    """A wrong way to fill in: another way to put back, another noise, another level told."""
    def wrong(f, x, us, known, mask, noises):
        for i, u in enumerate(us[:-1]):
            end = put(f(x, told(u, us[i + 1])), known, mask, i == len(us) - 2)
            if i < len(noises):
                x = base(x, end) + size(us[i + 1], us[-1]) * pick(noises, i)
        return end
    return wrong


def known_without_noise(f, x, us, known, mask, noises):
    for i, u in enumerate(us[:-1]):
        end = mask * known + (1 - mask) * f(x, u)
        if i < len(noises):
            x = end + (1 - mask) * math.sqrt(us[i + 1] ** 2 - us[-1] ** 2) * noises[i]
    return end


def noised_at_the_end(f, x, us, known, mask, noises):
    return filled(f, x, us, known, mask, noises) + us[-1] * noises[-1]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def jump(x, u):
    """Stands for a consistency function: not linear, and it mixes the coordinates."""
    return torch.tanh(x / (1 + 0.3 * u)) + 0.2 * x.flip(-1) / (1 + u)


X0, EPS, U = drawn(6, 2), drawn(6, 2, seed=1), 0.5 + 2 * torch.rand(6, 1, generator=torch.Generator().manual_seed(2))
BATCHES = ((X0, X0 + U * EPS, X0 + 0.7 * U * EPS, U, 0.7 * U), (X0, X0 + U * EPS, X0 + U * EPS, U, 0.7 * U),
           (X0, X0 + U * EPS, X0 + 0.7 * U * drawn(6, 2, seed=3), U, 0.7 * U),
           (X0, X0 + U * EPS, X0 + 1.3 * U * EPS, U, 1.3 * U),
           (X0, X0 + U * EPS, X0 + 0.97 * U * drawn(6, 2, seed=4), U, 0.97 * U),
           (X0, X0 + 0.01 * U * EPS, X0 + 0.009 * U * EPS, 0.01 * U, 0.009 * U))
HOLES = ((jump, 8 * drawn(5, 2, seed=5), (8.0, 2.0, 0.5, 0.2), drawn(5, 2, seed=6), torch.tensor([1.0, 0.0]),
          (drawn(5, 2, seed=7), drawn(5, 2, seed=8))),
         (jump, 8 * drawn(4, 3, seed=9), (8.0, 1.0, 0.3), drawn(4, 3, seed=10), torch.tensor([0.0, 1.0, 1.0]),
          (drawn(4, 3, seed=11),)))

EXERCISES = {
    "19.1": Exercise(
        "how much one call blurs", 1, 5, widths, ((0.7, 8.0, 0.02), (1.0, 1.0, 0.5), (2.0, 0.3, 0.1)),
        wrong={
            "the states are x0 + u·eps: their variance is width² + u², not u² alone": lambda d, u, m: (
                d**2 * u / (d**2 + u**2), u * math.sqrt((d**2 + m**2) / (d**2 + u**2))),
            "these are the factors of (19.3); times the deviation of the states they are the deviations of the answers":
                lambda d, u, m: (d**2 / (d**2 + u**2), math.sqrt((d**2 + m**2) / (d**2 + u**2))),
            "these are variances; take the roots": lambda d, u, m: (d**4 / (d**2 + u**2), d**2 + m**2),
            "paths end at u_min, where a little noise is left: its variance comes on top of width²":
                lambda d, u, m: (widths(d, u, m)[0], d),
            "the first is the deviation of x0 given x, what the denoiser does not know; asked is that of its answers":
                lambda d, u, m: (d * u / math.sqrt(d**2 + u**2), widths(d, u, m)[1]),
            "the denoiser does not answer with the same mean for every x; its answers still spread a little":
                lambda d, u, m: (0.0, widths(d, u, m)[1]),
            "the denoiser's answers are narrower than the data, by the root of width²/(width² + u²)":
                lambda d, u, m: (d, widths(d, u, m)[1]),
            "the second is the deviation of the states; f brings it down to that at u_min":
                lambda d, u, m: (widths(d, u, m)[0], math.hypot(d, u)),
            "the order is (denoiser, f)": lambda d, u, m: widths(d, u, m)[::-1],
        },
        also=(by_factors,)),
    "19.2": Exercise(
        "what is wrong with these neighbours?", 2, 15, fault, BATCHES,
        wrong={
            "fresh noise has the right size too; compare the two noises entry by entry, not their deviations":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else "wrong way" if (u1 > u).any() else (
                    "fresh noise" if ((x - x0) / u).std() / ((x1 - x0) / u1).std() > 3 else "healthy"),
            "what the states have in common is the noise of size 1: divide x − x0 by u and x1 − x0 by u1":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else "wrong way" if (u1 > u).any() else (
                    "healthy" if torch.allclose(x - x0, x1 - x0, atol=0.05) else "fresh noise"),
            "a neighbour on the noisier side has the same noise as well; ask for the levels too":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else (
                    "healthy" if torch.allclose((x - x0) / u, (x1 - x0) / u1, atol=1e-3) else "fresh noise"),
            "one and the same state, told a second level, is not fresh noise; ask for x1 = x first":
                lambda x0, x, x1, u, u1: "wrong way" if (u1 > u).any() else (
                    "healthy" if torch.allclose((x - x0) / u, (x1 - x0) / u1, atol=1e-3) else "fresh noise"),
            "subtraction and division round: ask whether the noises are close, not whether they are equal":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else "wrong way" if (u1 > u).any() else (
                    "healthy" if torch.equal((x - x0) / u, (x1 - x0) / u1) else "fresh noise"),
            "the numbers are float32: at low noise the two noises agree to about 1e-3, so give allclose an atol":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else "wrong way" if (u1 > u).any() else (
                    "healthy" if torch.allclose((x - x0) / u, (x1 - x0) / u1) else "fresh noise"),
            "neighbours at low noise lie close together and are still two points; compare their noises":
                lambda x0, x, x1, u, u1: "same point" if (x - x1).abs().max() < 0.02 else fault(x0, x, x1, u, u1),
            "these batches are not all healthy": lambda x0, x, x1, u, u1: "healthy",
            "the levels fall towards the data: the second one should be the smaller one":
                lambda x0, x, x1, u, u1: "same point" if torch.equal(x, x1) else "wrong way" if (u1 < u).any() else (
                    "healthy" if torch.allclose((x - x0) / u, (x1 - x0) / u1, atol=1e-3) else "fresh noise"),
        },
        also=(by_lines,)),
    "19.3": Exercise(
        "how fast the boundary lets go", 2, 10, scaling_for, ((0.01, 19.0, 0.5), (0.5, 2.0, 1.0), (0.2, 5.0, 0.7)),
        wrong={
            "missing square root: the factor on t is squared in c_skip":
                lambda share, t, d: d / t * (1 / share - 1),
            "d² stands in the sum below as well: 1/share − 1, not 1/share":
                lambda share, t, d: d / t * math.sqrt(1 / share),
            "this is the square of the factor; take its root": lambda share, t, d: (d / t) ** 2 * (1 / share - 1),
            "this makes c_out that share; c_skip is asked for":
                lambda share, t, d: d / t * share / math.sqrt(1 - share**2),
            "this makes 1 − c_skip that share": lambda share, t, d: d / t * math.sqrt(1 / (1 - share) - 1),
            "this is the product of factor and t; divide by t": lambda share, t, d: d * math.sqrt(1 / share - 1),
            "d is a deviation and stands squared; under the root it comes out once":
                lambda share, t, d: d * d / t * math.sqrt(1 / share - 1),
            "upside down: this is one over the factor": lambda share, t, d: t / (d * math.sqrt(1 / share - 1)),
            "this is c_skip at the factor 10; turn it round": lambda share, t, d: d * d / ((10 * t) ** 2 + d * d),
        },
        also=(by_odds,)),
    "19.4": Exercise(
        "the missing half, filled in", 3, 15, filled, HOLES,
        wrong={
            "the known numbers are not put back after the last jump": loop(
                lambda end, known, mask, last: end if last else mask * known + (1 - mask) * end),
            "the known numbers are never put back": loop(lambda end, known, mask, last: end),
            "they are put back after the last jump only; the jumps before must know them too": loop(
                lambda end, known, mask, last: mask * known + (1 - mask) * end if last else end),
            "the mask is 1 where known holds; here it is the other way round": loop(
                lambda end, known, mask, last: (1 - mask) * known + mask * end),
            "the end has the noise u_min already: add √(u'² − u_min²), not u'": loop(size=lambda u, least: u),
            "variances add, deviations do not: √(u'² − u_min²), not u' − u_min": loop(size=lambda u, least: u - least),
            "missing square root: the noise is multiplied by its deviation": loop(
                size=lambda u, least: u * u - least * least),
            "f is told the next level; tell it the one that x has": loop(told=lambda now, nxt: nxt),
            "the noise goes onto the end of the jump, not onto the old state": loop(base=lambda x, end: x),
            "each level has a noise of its own": loop(pick=lambda noises, i: noises[0] if i == 0 else noises[i - 1]),
            "the last jump is the answer: no noise after it": noised_at_the_end,
            "what is known gets noise too: f was trained on states with the noise of their level in every number":
                known_without_noise,
            "the first state is x as it is given; what is known comes in after the first jump":
                lambda f, x, us, known, mask, noises: filled(f, mask * known + (1 - mask) * x, us, known, mask, noises),
            "the last level is where paths end: nobody jumps from there": lambda f, x, us, known, mask, noises: (
                mask * known + (1 - mask) * f(filled(f, x, us, known, mask, noises), us[-1])),
            "this is one jump; go on through the levels": lambda f, x, us, known, mask, noises: (
                mask * known + (1 - mask) * f(x, us[0])),
        },
        also=(by_where,)),
}

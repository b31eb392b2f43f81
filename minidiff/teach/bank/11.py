"""Exercises of notebook 11, classifier-free guidance."""
import torch

from minidiff.teach.check import Exercise


def guided_eps(uncond, cond, scale):
    """The line from the answer without the class to that with it, continued: uncond + scale·(cond − uncond)."""
    return uncond + scale * (cond - uncond)


def hide(labels, chance, p, nothing):
    """The labels, with `nothing` in the place of those whose chance is below p."""
    return torch.where(chance < p, nothing, labels)


def scale_at(alpha, sigma, scale, low, high):
    """The scale where low ≤ sigma/alpha ≤ high, and 1, the class alone, elsewhere."""
    return scale if low <= sigma / alpha <= high else 1.0


def rescaled(out, cond, share):
    """`share` of the way to the standard deviation of cond, picture by picture."""
    axes = (1, 2, 3)
    ratio = cond.std(axes, keepdim=True) / out.std(axes, keepdim=True)
    return (1 - share + share * ratio) * out


def by_mixing(out, cond, share):
    """Lin et al.'s equations 15 and 16: scale all of it, then mix."""
    full = torch.stack([o * (c.std() / o.std()) for o, c in zip(out, cond)])
    return share * full + (1 - share) * out


def turned(how):
    """`rescaled` with other standard deviations."""
    return lambda out, cond, share: (1 - share + share * how(out, cond)) * out


AXES = (1, 2, 3)
G = torch.Generator().manual_seed(0)
U, C = torch.randn(2, 3, 2, generator=G)
LABELS, CHANCE = torch.tensor([4, 1, 3, 1, 2, 5, 1, 4]), torch.tensor([0.7, 0.05, 0.95, 0.31, 0.2, 0.85, 0.5, 0.11])
OUT = torch.randn(3, 2, 4, 5, generator=G) * torch.tensor([1.5, 3.0, 0.4]).view(3, 1, 1, 1) + 0.3
COND = torch.randn(3, 2, 4, 5, generator=G) * torch.tensor([1.0, 0.6, 1.4]).view(3, 1, 1, 1) - 0.5

EXERCISES = {
    "11.1": Exercise(
        "guidance with a scale", 1, 5, guided_eps, ((U, C, 7.5), (U, C, 0.0), (U, C, 1.0), (U[0], C[0], -0.5)),
        wrong={
            "the wrong sign, s·cond + (s − 1)·uncond: the weights must add up to 1, so it is s·cond − (s − 1)·uncond; "
            "here they add up to 2s − 1, and at s = 0 uncond comes out with a minus":
                lambda u, c, s: s * c + (s - 1) * u,
            "this is the paper's convention with s in the place of w: scale 1 must give cond; (1 + w)·cond − w·uncond "
            "needs w = s − 1": lambda u, c, s: (1 + s) * c - s * u,
            "the two are swapped: scale 0 must give uncond, and scale 1 cond": lambda u, c, s: c + s * (u - c),
            "the difference is turned round: it leads from uncond to cond, cond − uncond":
                lambda u, c, s: u + s * (u - c),
            "this adds all of cond instead of the difference: even where the class changes nothing, the noise grows":
                lambda u, c, s: u + s * c,
            "this is the correction alone; it starts from uncond": lambda u, c, s: s * (c - u),
            "this walks back from cond towards uncond: seen from cond, guidance goes on by (s − 1)·(cond − uncond)":
                lambda u, c, s: c - (s - 1) * (c - u),
            "this is Bayes' rule without a scale, cond itself": lambda u, c, s: c,
            "scale − 1 is counted from cond; from uncond it is scale, for scale 1 must give cond, not uncond":
                lambda u, c, s: u + (s - 1) * (c - u),
        },
        also=(lambda u, c, s: s * c + (1 - s) * u, lambda u, c, s: c + (s - 1) * (c - u), torch.lerp)),
    "11.2": Exercise(
        "labels hidden now and then", 1, 5, hide,
        ((LABELS, CHANCE, 0.3, 6), (LABELS, CHANCE, 0.1, 7), (LABELS, CHANCE, 0.0, 6), (LABELS, CHANCE, 1.0, 0)),
        wrong={
            "the other way round: this hides all but a share p": lambda y, r, p, n: torch.where(r < p, y, n),
            "those with the largest chance are hidden here; take those with a chance below p":
                lambda y, r, p, n: torch.where(r >= 1 - p, n, y),
            "one decision for the whole batch: each label is hidden or not by its own chance":
                lambda y, r, p, n: torch.full_like(y, n) if r[0] < p else y,
            "hidden labels become class 0, which means something else: put `nothing` there":
                lambda y, r, p, n: torch.where(r < p, 0, y),
            "hidden labels are left out, so that fewer come back than went in: put `nothing` in their place":
                lambda y, r, p, n: y[r >= p],
            "−1 marks the hidden ones here; the network has a number of its own for that, `nothing`":
                lambda y, r, p, n: torch.where(r < p, -1, y),
            "`nothing` is added to the label; it replaces it": lambda y, r, p, n: torch.where(r < p, y + n, y),
            "this draws random numbers of its own; use those that are given, `chance`":
                lambda y, r, p, n: torch.where(torch.rand(len(y)) < p, n, y),
        },
        also=(lambda y, r, p, n: y.masked_fill(r < p, n), lambda y, r, p, n: (r < p) * n + (r >= p) * y)),
    "11.3": Exercise(
        "the scale in a guidance interval", 1, 5, scale_at,
        ((0.6, 0.8, 5.0, 0.3, 3.0), (0.96, 0.28, 5.0, 0.3, 3.0), (0.28, 0.96, 4.0, 0.3, 3.0),
         (0.28, 0.96, 4.0, 0.3, 3.5), (0.5, 0.5, 3.0, 1.0, 2.0), (1.0, 0.75, 3.0, 0.5, 0.7),
         (0.1, 0.99, 2.0, 0.3, 3.0)),
        wrong={
            "outside of the interval this ignores the class: scale 0 is u, the class alone is scale 1":
                lambda a, s, scale, low, high: scale if low <= s / a <= high else 0.0,
            "the bounds are of sigma/alpha, this compares sigma":
                lambda a, s, scale, low, high: scale if low <= s <= high else 1.0,
            "the ratio is upside down: noise to signal is sigma/alpha":
                lambda a, s, scale, low, high: scale if low <= a / s <= high else 1.0,
            "amplitudes, not powers: the bounds are of sigma/alpha, not of its square":
                lambda a, s, scale, low, high: scale if low <= s * s / a / a <= high else 1.0,
            "inside and outside are swapped": lambda a, s, scale, low, high: 1.0 if low <= s / a <= high else scale,
            "the lower bound is missing": lambda a, s, scale, low, high: scale if s / a <= high else 1.0,
            "the upper bound is missing": lambda a, s, scale, low, high: scale if low <= s / a else 1.0,
            "the bounds themselves belong to the interval, see (11.6)":
                lambda a, s, scale, low, high: scale if low < s / a < high else 1.0,
        },
        also=(lambda a, s, scale, low, high: 1 + (scale - 1) * (low * a <= s <= high * a),)),
    "11.4": Exercise(
        "guidance rescale", 2, 10, rescaled, ((OUT, COND, 0.7), (OUT, COND, 1.0), (OUT, COND, 0.0)),
        wrong={
            "the ratio is upside down: the result should have the standard deviation of cond, so out's is divided by":
                turned(lambda o, c: o.std(AXES, keepdim=True) / c.std(AXES, keepdim=True)),
            "this takes one standard deviation for the whole batch; every picture has its own":
                turned(lambda o, c: c.std() / o.std()),
            "this takes one standard deviation per channel, (2, 3); (11.7) takes one over all numbers of a picture":
                turned(lambda o, c: c.std((2, 3), keepdim=True) / o.std((2, 3), keepdim=True)),
            "this takes the standard deviation over the batch, axis 0; (11.7) takes one over all numbers of a picture":
                turned(lambda o, c: c.std(0) / o.std(0)),
            "one number per picture does not fit (B,C,H,W), the error says so: keepdim=True makes it (B,1,1,1)":
                turned(lambda o, c: c.std(AXES) / o.std(AXES)),
            "one number per picture does not fit (B,C,H,W), the error says so: std(…, keepdim=True) gives (B,1,1,1)":
                lambda o, c, p: (1 - p) * o + p * o * (c.std(AXES) / o.std(AXES)),
            "variance for standard deviation: the numbers are scaled by the ratio of the deviations":
                turned(lambda o, c: c.var(AXES, keepdim=True) / o.var(AXES, keepdim=True)),
            "the two shares are swapped: at share 0 the output stays as it is":
                lambda o, c, p: rescaled(o, c, 1 - p),
            "share φ of cond itself is mixed in here; what is mixed is the output and the output rescaled":
                lambda o, c, p: (1 - p) * o + p * c,
            "this ignores the share and always rescales fully": lambda o, c, p: rescaled(o, c, 1.0),
            "the part 1 − φ that stays as it was is missing": lambda o, c, p:
                p * c.std(AXES, keepdim=True) / o.std(AXES, keepdim=True) * o,
            "the mean is taken away too; (11.7) only multiplies":
                lambda o, c, p: (1 - p) * o + rescaled(o - o.mean(AXES, keepdim=True), c, 1.0) * p,
        },
        also=(by_mixing,)),
}

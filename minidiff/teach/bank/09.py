"""Exercises of notebook 09, is it any good?"""
import math

import torch

from minidiff.teach.check import Exercise


def frechet_diagonal(mean_a, var_a, mean_b, var_b):
    """Means and variances (D,) of two Gaussians with diagonal covariances -> (9.1), a number."""
    return (mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum()


def extrapolated(value_n, n, value_m, m):
    """The mean distances measured with n and with m rows, n ≠ m -> d², what (9.2) gives for ever larger sets."""
    return (n * value_n - m * value_m) / (n - m)


def unbiased(k_aa, k_bb, k_ab):
    """Kernel values (N,N), (M,M) and (N,M) -> d_k of (9.3), a number."""
    n, m = k_ab.shape
    return (k_aa.sum() - k_aa.trace()) / (n * (n - 1)) + (k_bb.sum() - k_bb.trace()) / (m * (m - 1)) - 2 * k_ab.mean()


def samples_needed(p, half):
    """Expected share p, and half the width that the 95 % interval may have -> the smallest n, an integer."""
    return math.ceil(1.96**2 * p * (1 - p) / half**2)


def without_loops(k_aa, k_bb, k_ab):
    """The other way to leave out a row with itself, by a mask."""
    within = [k[~torch.eye(len(k), dtype=torch.bool)].mean() for k in (k_aa, k_bb)]
    return within[0] + within[1] - 2 * k_ab.mean()


GAUSSIANS = ((torch.tensor([0.3, -1.2, 0.5]), torch.tensor([0.5, 2.0, 0.09]),
              torch.tensor([-0.4, 0.1, 0.9]), torch.tensor([1.7, 0.6, 0.3])),)
MEASURED = ((0.83, 400, 1.4, 150), (0.31, 1000, 0.4, 300))
WITHIN_A = torch.tensor([[3.0, 0.4, 1.1], [0.4, 2.0, 0.7], [1.1, 0.7, 4.0]])
WITHIN_B = torch.tensor([[2.5, 0.9, 0.2, 1.3], [0.9, 3.5, 0.6, 0.8], [0.2, 0.6, 1.9, 1.6], [1.3, 0.8, 1.6, 2.2]])
BETWEEN = torch.tensor([[0.5, 0.1, 0.8, 0.3], [1.2, 0.7, 0.2, 0.9], [0.6, 0.4, 1.5, 0.1]])

EXERCISES = {
    "09.1": Exercise(
        "the Fréchet distance of Gaussians with diagonal covariances", 1, 5, frechet_diagonal, GAUSSIANS,
        wrong={
            "you compare variances; (9.1) compares standard deviations, so take the roots first":
                lambda m, v, m1, v1: ((m - m1) ** 2).sum() + ((v - v1) ** 2).sum(),
            "the root of the product of the variances is missing: tr 2·(S_a S_b)^½":
                lambda m, v, m1, v1: ((m - m1) ** 2 + v + v1 - 2 * v * v1).sum(),
            "the cross term counts twice: v_a + v_b − 2·√(v_a·v_b)":
                lambda m, v, m1, v1: ((m - m1) ** 2 + v + v1 - (v * v1).sqrt()).sum(),
            "the means are missing": lambda m, v, m1, v1: ((v.sqrt() - v1.sqrt()) ** 2).sum(),
            "only the means are compared; the widths count as well": lambda m, v, m1, v1: ((m - m1) ** 2).sum(),
            "the difference of the means should be squared":
                lambda m, v, m1, v1: ((m - m1).abs() + (v.sqrt() - v1.sqrt()) ** 2).sum(),
            "the norm of the difference of the means should be squared":
                lambda m, v, m1, v1: (m - m1).norm() + ((v.sqrt() - v1.sqrt()) ** 2).sum(),
            "this is d; (9.1) is its square": lambda m, v, m1, v1: frechet_diagonal(m, v, m1, v1).sqrt(),
            "you average over the features; (9.1) adds them up":
                lambda m, v, m1, v1: frechet_diagonal(m, v, m1, v1) / len(m),
            "these are the parts of each feature; add them up":
                lambda m, v, m1, v1: (m - m1) ** 2 + (v.sqrt() - v1.sqrt()) ** 2,
            "the widths are added: the cross term has a minus sign":
                lambda m, v, m1, v1: ((m - m1) ** 2 + (v.sqrt() + v1.sqrt()) ** 2).sum(),
        },
        also=(lambda m, v, m1, v1: sum(((m - m1) ** 2 + v + v1 - 2 * (v * v1) ** 0.5).tolist()),)),
    "09.2": Exercise(
        "the distance for ever larger sets, from two measurements", 2, 10, extrapolated, MEASURED,
        wrong={
            "this is right for m = n/2 only: weigh the two by their numbers of rows": lambda f, n, h, m: 2 * f - h,
            "this is c; asked is d²": lambda f, n, h, m: (f - h) / (1 / n - 1 / m),
            "this is c/n, the bias of the first; take it from the first value":
                lambda f, n, h, m: f - extrapolated(f, n, h, m),
            "the bias is added; it is to be taken away": lambda f, n, h, m: 2 * f - extrapolated(f, n, h, m),
            "an average still has a bias": lambda f, n, h, m: (f + h) / 2,
            "an average still has a bias, however it is weighed": lambda f, n, h, m: (n * f + m * h) / (n + m),
            "the numbers of rows are swapped: each value is multiplied by its own":
                lambda f, n, h, m: (m * f - n * h) / (m - n),
            "the sign is wrong: n·value_n − m·value_m is divided by n − m": lambda f, n, h, m:
                -extrapolated(f, n, h, m),
            "the bias falls as 1/n, not as 1/√n":
                lambda f, n, h, m: (math.sqrt(n) * f - math.sqrt(m) * h) / (math.sqrt(n) - math.sqrt(m)),
            "the bias falls as 1/n, not as 1/n²": lambda f, n, h, m: (n**2 * f - m**2 * h) / (n**2 - m**2),
            "divide by n − m": lambda f, n, h, m: n * f - m * h,
        },
        also=(lambda f, n, h, m: f - (h - f) / (1 / m - 1 / n) / n,
              lambda f, n, h, m: h + (f - h) * n / (n - m))),
    "09.3": Exercise(
        "the kernel distance without the pairs of a row with itself", 2, 10, unbiased, ((WITHIN_A, WITHIN_B, BETWEEN),),
        wrong={
            "a row is compared with itself: the diagonals are to be left out, or the distance is biased":
                lambda a, b, c: a.mean() + b.mean() - 2 * c.mean(),
            "without the diagonal there are N·(N − 1) pairs, not N²": lambda a, b, c:
                (a.sum() - a.trace()) / len(a)**2 + (b.sum() - b.trace()) / len(b)**2 - 2 * c.mean(),
            "the diagonals are still in the sums": lambda a, b, c:
                a.sum() / (len(a) * (len(a) - 1)) + b.sum() / (len(b) * (len(b) - 1)) - 2 * c.mean(),
            "the last term counts twice": lambda a, b, c: unbiased(a, b, c) + c.mean(),
            "the last term is subtracted": lambda a, b, c: unbiased(a, b, c) + 4 * c.mean(),
            "the sign is wrong: likeness within the sets counts positive": lambda a, b, c: -unbiased(a, b, c),
            "the last term is an average over all N·M pairs": lambda a, b, c: unbiased(a, b, c) + 2 * c.mean()
                - 2 * c.sum(),
            "each pair is counted once in your first sums, and twice in (9.3)": lambda a, b, c:
                unbiased(a, b, c) / 2 - c.mean(),
            "in the last term no pair is left out: the rows are of different sets": lambda a, b, c:
                unbiased(a, b, c) + 2 * c.mean() - 2 * (c.sum() - c.trace()) / (c.numel() - min(c.shape)),
            "(9.3) has no root": lambda a, b, c: unbiased(a, b, c).clamp(min=0).sqrt(),
        },
        also=(without_loops,)),
    "09.4": Exercise(
        "the number of samples that an interval needs", 1, 5, samples_needed,
        ((0.5, 0.2), (0.9, 0.11), (0.98, 0.04), (0.5, 0.49)),  # the last is 4, exactly
        wrong={
            "1.96 should be squared: it stands outside of the root": lambda p, h: math.ceil(1.96 * p * (1 - p) / h**2),
            "1.96 is missing: this is one standard deviation": lambda p, h: math.ceil(p * (1 - p) / h**2),
            "`half` is half the width already": lambda p, h: math.ceil(1.96**2 * p * (1 - p) / (h / 2) ** 2),
            "`half` is half the width, not all of it": lambda p, h: math.ceil(1.96**2 * p * (1 - p) / (2 * h) ** 2),
            "`half` should be squared": lambda p, h: math.ceil(1.96**2 * p * (1 - p) / h),
            "the variance of a share is p·(1 − p)/n: 1 − p is missing": lambda p, h: math.ceil(1.96**2 * p / h**2),
            "this is the worst case, p = ½; here p is known": lambda p, h: math.ceil(1.96**2 / 4 / h**2),
            "rounded down it is one sample too few": lambda p, h: math.floor(1.96**2 * p * (1 - p) / h**2),
            "one too many where the number is whole already: `math.ceil` leaves 4.0 at 4":
                lambda p, h: math.floor(1.96**2 * p * (1 - p) / h**2) + 1,
            "round up to a whole number of samples": lambda p, h: 1.96**2 * p * (1 - p) / h**2,
            "one too many: the interval may be as wide as `half` says": lambda p, h: samples_needed(p, h) + 1,
            "this is √n": lambda p, h: math.ceil(1.96 * math.sqrt(p * (1 - p)) / h),
        },
        also=(lambda p, h: next(n for n in range(1, 10**6) if 1.96 * math.sqrt(p * (1 - p) / n) <= h),)),
}

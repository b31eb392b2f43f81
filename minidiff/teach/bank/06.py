"""Exercises of notebook 06, a U-Net from scratch."""
import math

import torch
import torch.nn.functional as F

from minidiff.teach.check import Exercise


def conv_facts(c_in, c_out, k, stride, padding, side):
    """Side of the output and number of weights of a convolution with bias; six integers -> (int, int)."""
    return (side + 2 * padding - k) // stride + 1, c_out * (c_in * k * k + 1)


def side_of(k, stride, padding, side):
    return (side + 2 * padding - k) // stride + 1


def group_norm(x, groups, weight, bias, eps):
    """x (B,C,H,W), weight and bias (C,): every group of C/groups channels of every picture to mean 0 and variance 1."""
    y = x.unflatten(1, (groups, -1))  # (B, groups, C/groups, H, W)
    y = (y - y.mean((2, 3, 4), keepdim=True)) / torch.sqrt(y.var((2, 3, 4), correction=0, keepdim=True) + eps)
    return y.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def scaled(y, weight, bias):
    return y * weight[:, None, None] + bias[:, None, None]


def normed(x, axes, eps, correction=0, mean=True):
    center = x.mean(axes, keepdim=True) if mean else 0
    return (x - center) / torch.sqrt(x.var(axes, correction=correction, keepdim=True) + eps)


def grouped(x, groups, weight, bias, norm):
    return scaled(norm(x.unflatten(1, (groups, -1))).flatten(1, 2), weight, bias)


INNER = (2, 3, 4)  # C/groups, H and W of a picture whose channels are split into groups


def strided_groups(x, groups, weight, bias, eps):
    """Channels i, i + groups, i + 2·groups … together."""
    y = normed(x.unflatten(1, (-1, groups)), (1, 3, 4), eps)
    return scaled(y.flatten(1, 2), weight, bias)


def groups_by_loop(x, groups, weight, bias, eps):
    rows = []
    for picture in x:
        parts = [(part - part.mean()) / (part.var(unbiased=False) + eps) ** 0.5 for part in picture.chunk(groups)]
        rows.append(torch.cat(parts) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1))
    return torch.stack(rows)


def up_channels(chs, n):
    """Channels into every residual block of the way up, coarsest first. chs: per floor, finest first; n blocks each."""
    kept = [chs[0]]                                     # conv_in, then on each floor n blocks and a downsampling
    for ch in chs:
        kept += [ch] * (n + 1)
    kept.pop()                                          # there is none on the coarsest floor
    found, arriving = [], chs[-1]
    for out in reversed(chs):
        for _ in range(n + 1):
            found.append(arriving + kept.pop())
            arriving = out
    return found


def kept_channels(chs, n, first=True, downs=True):
    kept = [chs[0]] * first
    for level, ch in enumerate(chs):
        kept += n * [ch] + [ch] * (downs and level < len(chs) - 1)
    return kept


def walk_up(chs, n, *, kept=None, extra=1, arriving=True, last=-1, carry=True):
    """The way up with one thing done differently."""
    kept, found, ch = list(kept or kept_channels(chs, n)), [], chs[-1]
    for out in reversed(chs):
        for j in range(n + extra):
            found.append((ch if carry or j else out) * arriving + (kept.pop(last) if kept else 0))
            ch = out
    return found


def piled_up(chs, n):
    kept, found, ch = kept_channels(chs, n), [], chs[-1]
    while kept:
        ch += kept.pop()
        found.append(ch)
    return found


def by_formula(chs, n):
    """The same, level by level, from which maps are left there."""
    found, below = [], chs[-1]
    for i in reversed(range(len(chs))):
        finer = chs[i - 1] if i else chs[0]
        found += [below + chs[i], *[2 * chs[i]] * (n - 1), chs[i] + finer]
        below = chs[i]
    return found


torch.manual_seed(6)
CONVS = (3, 32, 3, 1, 1, 16), (5, 7, 4, 3, 2, 20), (6, 4, 3, 2, 1, 16), (2, 9, 5, 1, 0, 12)
NORMS = ((torch.randn(2, 6, 5, 4) * 3 + 1, 3, torch.randn(6), torch.randn(6), 0.3),
         (torch.randn(3, 8, 2, 5).cumsum(1), 2, torch.rand(8) + 0.5, torch.randn(8), 1e-5))
SHAPES = ((32, 64, 96), 1), ((320, 640, 1280, 1280), 2), ((8, 20), 3)

EXERCISES = {
    "06.1": Exercise(
        "what a convolution gives and costs", 1, 5, conv_facts, CONVS,
        wrong={
            "the size is right; the count lacks the biases: one number for each output channel":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * i * k * k),
            "the size is right; there is one bias for each output channel, not one for each input channel":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), i * (o * k * k + 1)),
            "the size is right; a kernel has k·k entries for each input channel, not k":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * (i * k + 1)),
            "the size is right; every output channel looks at all input channels, so c_in is in the count too":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * (k * k + 1)),
            "the size is right; the weights are the same at every position, so the side is not in their number":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), side_of(k, s, p, n) ** 2 * o * (i * k * k + 1)),
            "the size is right; this is the dense layer's count. A convolution has one small kernel for all positions":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * side_of(k, s, p, n) ** 2 * (i * n * n + 1)),
            "the size is right; there is one bias in each output channel, not one in each of its entries":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * (i + 1) * k * k),
            "the size is right; there is one bias for each output channel, not one for the whole layer":
                lambda i, o, k, s, p, n: (side_of(k, s, p, n), o * i * k * k + 1),
            "brackets: the whole of side + 2p − k is divided by the stride":
                lambda i, o, k, s, p, n: (n + 2 * p - k // s + 1, o * (i * k * k + 1)),
            "two things: padding is added on both sides, 2p, and there is one bias for each output channel":
                lambda i, o, k, s, p, n: ((n + p - k) // s + 1, o * i * k * k + 1),
            "off by one in the size: the kernel also fits at its first place, so add 1 after dividing":
                lambda i, o, k, s, p, n: ((n + 2 * p - k) // s, o * (i * k * k + 1)),
            "padding is added on both sides: 2p, not p":
                lambda i, o, k, s, p, n: ((n + p - k) // s + 1, o * (i * k * k + 1)),
            "the stride is missing: the kernel moves on by s, so it fits about side/s times":
                lambda i, o, k, s, p, n: (n + 2 * p - k + 1, o * (i * k * k + 1)),
            "the padding is missing in the size": lambda i, o, k, s, p, n: ((n - k) // s + 1, o * (i * k * k + 1)),
            "the kernel must fit whole: round down before adding 1 (// in Python)":
                lambda i, o, k, s, p, n: ((n + 2 * p - k) / s + 1, o * (i * k * k + 1)),
            "round down, not up: a kernel that does not fit whole gives no output":
                lambda i, o, k, s, p, n: (math.ceil((n + 2 * p - k) / s) + 1, o * (i * k * k + 1)),
            "the side divided by the stride is right only where k and p go with it; take the kernel and padding in":
                lambda i, o, k, s, p, n: (n // s, o * (i * k * k + 1)),
            "the other way round: first the side, then the count": lambda *a: conv_facts(*a)[::-1],
            "these are the count and the size of the whole map; the side alone is asked for":
                lambda *a: (conv_facts(*a)[0] ** 2, conv_facts(*a)[1]),
        },
        also=(lambda i, o, k, s, p, n: (len(range(0, n + 2 * p - k + 1, s)), sum(o * i * k * k for _ in "1") + o),
              lambda i, o, k, s, p, n: [math.floor((n + 2 * p - k) / s + 1), o * i * k**2 + o])),
    "06.2": Exercise(
        "GroupNorm", 2, 10, group_norm, NORMS,
        wrong={
            "each channel by itself, which is instance norm: the mean and variance are over all channels of a group":
                lambda x, g, w, b, e: scaled(normed(x, (2, 3), e), w, b),
            "over the whole batch, which is batch norm: every picture has its own mean and variance":
                lambda x, g, w, b, e: scaled(normed(x, (0, 2, 3), e), w, b),
            "groups, but with mean and variance over the batch too: every picture has its own":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: normed(y, (0, *INNER), e)),
            "all channels as one group: split them into `groups` first":
                lambda x, g, w, b, e: scaled(normed(x, (1, 2, 3), e), w, b),
            "over the channels of a group only: the average runs over all pixels as well":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: normed(y, (2,), e)),
            "the groups are neighbouring channels, 0, 1, 2 … together, not channels that lie a fixed step apart":
                strided_groups,
            "here `groups` is taken for the number of channels in a group; it is the number of groups":
                lambda x, g, w, b, e: group_norm(x, x.shape[1] // g, w, b, e),
            "the variance is the plain mean of squares; torch's var divides by n − 1 unless correction=0":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: normed(y, INNER, e, correction=1)),
            "the variance stands in the denominator without its square root":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: (y - y.mean(INNER, keepdim=True)) / (
                    y.var(INNER, correction=0, keepdim=True) + e)),
            "eps is added to the variance, under the root, not to the standard deviation":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: (y - y.mean(INNER, keepdim=True)) / (
                    y.std(INNER, correction=0, keepdim=True) + e)),
            "eps is added to the variance, and the standard deviation here divides by n − 1: use correction=0":
                lambda x, g, w, b, e: grouped(x, g, w, b, lambda y: (y - y.mean(INNER, keepdim=True)) / (
                    y.std(INNER, keepdim=True) + e)),
            "eps is missing": lambda x, g, w, b, e: group_norm(x, g, w, b, 0.0),
            "the mean is not taken away": lambda x, g, w, b, e: grouped(
                x, g, w, b, lambda y: normed(y, INNER, e, mean=False)),
            "normalised well; weight and bias are missing": lambda x, g, w, b, e: F.group_norm(x, g, eps=e),
            "weight and bias are missing, and torch's var divides by n − 1 unless correction=0":
                lambda x, g, w, b, e: normed(x.unflatten(1, (g, -1)), INNER, e, correction=1).flatten(1, 2),
            "the bias is missing": lambda x, g, w, b, e: F.group_norm(x, g, w, eps=e),
            "the weight is missing": lambda x, g, w, b, e: F.group_norm(x, g, None, b, e),
            "weight and bias are applied before normalising; they come after, so that the network can choose the scale":
                lambda x, g, w, b, e: F.group_norm(scaled(x, w, b), g, eps=e),
            "weight and bias act on the channels, axis 1: give them the shape (C, 1, 1)":
                lambda x, g, w, b, e: F.group_norm(x, g, eps=e) * w + b,
            "give weight and bias the shape (C, 1, 1): they act on the channels, axis 1":
                lambda x, g, w, b, e: w * F.group_norm(x, g, eps=e) + b,
            "the result is still split into groups: put the channels back together, (B, C, H, W)":
                lambda x, g, w, b, e: F.group_norm(x, g, w, b, e).unflatten(1, (g, -1)),
        },
        also=(F.group_norm, groups_by_loop)),
    "06.3": Exercise(
        "the channels of the way up", 2, 15, up_channels, SHAPES,
        wrong={
            "the last map kept is read first (pop from the end): maps must meet maps of their own size":
                lambda c, n: walk_up(c, n, last=0),
            "these are the maps that were kept; to each, add the channels that arrive from below":
                lambda c, n: walk_up(c, n, arriving=False),
            "this is only what arrives; to each, add the channels of the map kept":
                lambda c, n: walk_up(c, n, kept=[0] * 99),
            "the way up has one residual block more at each resolution than the way down, n + 1":
                lambda c, n: walk_up(c, n, extra=0),
            "n is not used as it should be: the way down has n blocks on each floor, the way up n + 1":
                lambda c, n: up_channels(c, 1),
            "a floor keeps its n blocks and a downsampling, so n + 1 maps, and the way up has a block for each":
                lambda c, n: up_channels(c, n - 1),
            "conv_in and the downsamplings are kept as well, so the way up has n + 1 blocks on each floor":
                lambda c, n: walk_up(c, n, kept=kept_channels(c, n, first=False, downs=False), extra=0),
            "the first block of a resolution still gets the channels of the resolution below, not its own":
                lambda c, n: walk_up(c, n, carry=False),
            "conv_in's output is kept as well": lambda c, n: walk_up(c, n, kept=kept_channels(c, n, first=False)),
            "the maps after each downsampling are kept as well":
                lambda c, n: walk_up(c, n, kept=kept_channels(c, n, downs=False)),
            "a downsampling keeps the channels of its floor, and after the coarsest floor there is none":
                lambda c, n: walk_up(c, n, kept=kept_channels(c, n) + [c[-1]]),
            "the order is that of the way up: the coarsest resolution first": lambda c, n: up_channels(c, n)[::-1],
            "a block gives out the channels of its floor, however many went in: what arrives does not pile up":
                piled_up,
            "twice the channels of a resolution is right only inside it: its last block reads a map of the finer one":
                lambda c, n: [2 * ch for ch in reversed(c) for _ in range(n + 1)],
            "these are the channels that go out of the blocks; what goes in is asked for":
                lambda c, n: [ch for ch in reversed(c) for _ in range(n + 1)],
            "these are the channels of the maps kept, on the way down": kept_channels,
            "one flat list, please: one number after the other, not one list per resolution":
                lambda c, n: [up_channels(c, n)[i:i + n + 1] for i in range(0, len(c) * (n + 1), n + 1)],
        },
        also=(by_formula, lambda c, n: tuple(by_formula(tuple(c), n)))),
}

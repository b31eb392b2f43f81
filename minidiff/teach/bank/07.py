"""Exercises of notebook 07, attention."""
import math

import torch

from minidiff.teach.check import Exercise

attention = torch.nn.functional.scaled_dot_product_attention


def attend_one(q, k, v):
    """softmax_j(q·k_j/√d) v_j: q (d,), k (M,d), v (M,e) -> (e,)."""
    return (k @ q / math.sqrt(len(q))).softmax(0) @ v


def attend_in_heads(q, k, v, heads):
    """Attention in each of `heads` parts of the channels: q (N,C), k and v (M,C) -> (N,C)."""
    q, k, v = [x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]  # (heads, N or M, C/heads)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)                   # (heads, N, M)
    return (weights @ v).transpose(0, 1).flatten(1)


def multiplications(n, m, ch):
    """n queries to m tokens, ch channels each: queries and output, keys and values, and the two products."""
    return 2 * n * ch**2 + 2 * m * ch**2 + 2 * n * m * ch


def by_hand(q, k, v):
    louds = [math.exp(sum(a * b for a, b in zip(q.tolist(), row.tolist())) / len(q) ** 0.5) for row in k]
    return sum(loud / sum(louds) * row for loud, row in zip(louds, v))


def part(x, i, heads):
    """The channels of head i."""
    d = x.shape[1] // heads
    return x[:, i * d:(i + 1) * d]


def head_by_head(q, k, v, heads):
    return torch.cat([attention(*[part(x, i, heads) for x in (q, k, v)]) for i in range(heads)], 1)


def split(x, heads):
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def variant(q, k, v, heads, cut=split, scale=None, dim=-1, join=lambda o: o.transpose(0, 1).flatten(1)):
    """The solution with one part of it exchanged."""
    q, k, v = cut(q, heads), cut(k, heads), cut(v, heads)
    return join((q @ k.mT / (scale or math.sqrt(q.shape[-1]))).softmax(dim) @ v)


def rows(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


ONE = (rows((8,), (7, 8), (7, 5)), rows((3,), (4, 3), (4, 6), seed=1))
HEADS = ((*rows((5, 12), (7, 12), (7, 12)), 3), (*rows((3, 8), (2, 8), (2, 8), seed=1), 4),
         (*rows((3, 6), (4, 6), (4, 6)), 1))
COST = ((64, 64, 32), (4096, 77, 320), (10, 3, 8))

EXERCISES = {
    "07.1": Exercise(
        "attention of one query", 1, 5, attend_one, ONE,
        wrong={
            "the square root of d is missing: divide q·k by √d before the softmax":
                lambda q, k, v: (k @ q).softmax(0) @ v,
            "this divides by d; the temperature is its square root": lambda q, k, v: (k @ q / len(q)).softmax(0) @ v,
            "this multiplies by √d; divide": lambda q, k, v: (k @ q * math.sqrt(len(q))).softmax(0) @ v,
            "the sign is turned round: the more alike a key is to the query, the more weight it should have":
                lambda q, k, v: (-(k @ q) / math.sqrt(len(q))).softmax(0) @ v,
            "this divides by the root of the number of keys; d is the width of the query":
                lambda q, k, v: (k @ q / math.sqrt(len(k))).softmax(0) @ v,
            "this divides by the root of the width of the values; d is the width of query and keys":
                lambda q, k, v: (k @ q / math.sqrt(v.shape[1])).softmax(0) @ v,
            "the softmax is missing: these weights can be negative, and do not add up to 1":
                lambda q, k, v: (k @ q / math.sqrt(len(q))) @ v,
            "this divides the logits by their sum; the softmax takes the exponential of each first":
                lambda q, k, v: (k @ q) / (k @ q).sum() @ v,
            "exponentials, but not divided by their sum: the weights have to add up to 1":
                lambda q, k, v: (k @ q / math.sqrt(len(q))).exp() @ v,
            "this averages the keys; they only decide on the weights, the answer is made of the values":
                lambda q, k, v: (k @ q / math.sqrt(len(q))).softmax(0) @ k,
            "the softmax ran over an axis of length 1, so every weight is 1: it has to run over the keys":
                lambda q, k, v: v.sum(0),
            "the softmax ran over an axis of length 1, so every weight is 1: with q as a matrix of one row, the keys "
            "are its last axis": lambda q, k, v: (q[None] @ k.mT / math.sqrt(len(q))).softmax(0) @ v,
            "each value has its weight, but they are not added up yet":
                lambda q, k, v: (k @ q / math.sqrt(len(q))).softmax(0)[:, None] * v,
            "the weights add up to 1 already: add the weighted values up, do not average them":
                lambda q, k, v: ((k @ q / math.sqrt(len(q))).softmax(0)[:, None] * v).mean(0),
            "this measures likeness by the distance, as (7.2); here it is the scalar product":
                lambda q, k, v: (-(k - q).square().sum(1) / math.sqrt(len(q))).softmax(0) @ v,
            "this takes a sigmoid of each logit; the weights of a softmax compete, and add up to 1":
                lambda q, k, v: (k @ q / math.sqrt(len(q))).sigmoid() @ v,
            "this takes the value of the best key alone; a soft look-up lets all keys answer":
                lambda q, k, v: v[(k @ q).argmax()],
            "this is the plain mean of the values: the query has no say": lambda q, k, v: v.mean(0),
            "these are the weights; the answer is the average of the values with them":
                lambda q, k, v: (k @ q / math.sqrt(len(q))).softmax(0),
            "this divides by √d after the softmax; the root belongs inside, on the logits":
                lambda q, k, v: (k @ q).softmax(0) @ v / math.sqrt(len(q)),
            "the answer has an axis too many: for one query it is a row of e numbers":
                lambda q, k, v: ((k @ q / math.sqrt(len(q))).softmax(0) @ v)[None],
        },
        also=(by_hand, lambda q, k, v: attention(q[None], k, v)[0])),
    "07.2": Exercise(
        "attention in heads", 2, 15, attend_in_heads, HEADS,
        wrong={
            "this cuts without moving an axis, so that a head gets other positions instead of other channels: "
            "unflatten the channels, then transpose":
                lambda q, k, v, h: variant(q, k, v, h, cut=lambda x, h: x.reshape(h, x.shape[0], -1)),
            "the heads are still behind the positions, so 5 queries stand against 7 keys: move them in front "
            "(transpose) before the products, for q, k and v alike":
                lambda q, k, v, h: variant(q, k, v, h, cut=lambda x, h: x.unflatten(1, (h, -1))),
            "the root is that of C; each head is C/H wide, and that is its d":
                lambda q, k, v, h: variant(q, k, v, h, scale=math.sqrt(q.shape[1])),
            "the square root is missing": lambda q, k, v, h: variant(q, k, v, h, scale=1.0),
            "this is one head over all channels: every head has weights of its own":
                lambda q, k, v, h: variant(q, k, v, 1),
            "this is one head over all channels, with the root of C/H: every head has weights of its own":
                lambda q, k, v, h: variant(q, k, v, 1, scale=math.sqrt(q.shape[1] / h)),
            "the softmax runs over the queries; it runs over the keys, the last axis":
                lambda q, k, v, h: variant(q, k, v, h, dim=-2),
            "the softmax runs over the heads; it runs over the keys, the last axis":
                lambda q, k, v, h: variant(q, k, v, h, dim=0),
            "the heads are right, but put together in the wrong order: transpose back before you flatten":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.reshape(len(q), -1)),
            "the heads are right, but their channels are interleaved at the end: transpose the heads in front of the "
            "channels, not behind them":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.permute(1, 2, 0).flatten(1)),
            "every H-th channel goes to a head here; a head owns C/H neighbouring channels: unflatten to (H, C/H)":
                lambda q, k, v, h: variant(q, k, v, h, cut=lambda x, h: x.unflatten(1, (-1, h)).permute(2, 0, 1)),
            "every H-th channel goes to a head here, and back again; a head owns C/H neighbouring channels: unflatten "
            "to (H, C/H)":
                lambda q, k, v, h: variant(q, k, v, h, cut=lambda x, h: x.unflatten(1, (-1, h)).permute(2, 0, 1),
                                           join=lambda o: o.permute(1, 2, 0).flatten(1)),
            "the heads are added up; put them side by side":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.sum(0)),
            "the heads are averaged; put them side by side":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.mean(0)),
            "each head is right, but they are still an axis of their own: put them side by side, (N, C)":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o),
            "each head is right, but positions, heads and width are still three axes: flatten the last two":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.transpose(0, 1)),
            "the heads lie below each other, (H·N, C/H); put them side by side":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.flatten(0, 1)),
            "the last axis got positions and channels here: transpose back before you flatten":
                lambda q, k, v, h: variant(q, k, v, h, join=lambda o: o.flatten(1)),
            "this cuts without moving an axis, on the way in and out, so that a head gets other positions instead of "
            "other channels": lambda q, k, v, h: variant(q, k, v, h, cut=lambda x, h: x.reshape(h, x.shape[0], -1),
                                                        join=lambda o: o.reshape(len(q), -1)),
            "heads is taken for the width of a head here; there are `heads` parts, each C/heads wide":
                lambda q, k, v, h: head_by_head(q, k, v, q.shape[1] // h),
            "each head has its own values too: cut v as q and k":
                lambda q, k, v, h: torch.cat([attention(part(q, i, h), part(k, i, h), v) for i in range(h)], 1),
            "this averages the keys; the answer is made of the values": lambda q, k, v, h: variant(q, k, k, h),
        },
        also=(head_by_head,
              lambda q, k, v, h: attention(split(q, h), split(k, h), split(v, h)).transpose(0, 1).flatten(1))),
    "07.3": Exercise(
        "the cost of cross-attention", 2, 10, multiplications, COST,
        wrong={
            "this is self-attention, with n tokens of context; keys and values are made from m tokens":
                lambda n, m, ch: 4 * n * ch**2 + 2 * ch * n**2,
            "all four matrices are applied to n tokens here; keys and values are made from the m of the context":
                lambda n, m, ch: 4 * n * ch**2 + 2 * n * m * ch,
            "three matrices on n tokens, one on m: queries and output have n, keys and values m":
                lambda n, m, ch: 3 * n * ch**2 + m * ch**2 + 2 * n * m * ch,
            "one matrix on n tokens, three on m: queries and output have n, keys and values m":
                lambda n, m, ch: n * ch**2 + 3 * m * ch**2 + 2 * n * m * ch,
            "the matrix after the heads is missing, which is applied to n tokens":
                lambda n, m, ch: n * ch**2 + 2 * m * ch**2 + 2 * n * m * ch,
            "two matrices are applied to the m tokens of the context, for keys and for values; one is missing":
                lambda n, m, ch: 2 * n * ch**2 + m * ch**2 + 2 * n * m * ch,
            "two of the four matrices are missing: each kind of token meets two":
                lambda n, m, ch: (n + m) * ch**2 + 2 * n * m * ch,
            "each of the four matrices is applied to n or to m tokens, not to both":
                lambda n, m, ch: 4 * (n + m) * ch**2 + 2 * n * m * ch,
            "a matrix costs ch² for every token that it is applied to, not once":
                lambda n, m, ch: 4 * ch**2 + 2 * n * m * ch,
            "all four matrices are applied to m tokens here; queries and output have n":
                lambda n, m, ch: 4 * m * ch**2 + 2 * n * m * ch,
            "only one of the two products is counted: queries with keys, and weights with values":
                lambda n, m, ch: 2 * (n + m) * ch**2 + n * m * ch,
            "these are the two products only; queries, keys, values and output are products with matrices too":
                lambda n, m, ch: 2 * n * m * ch,
            "these are the four matrices only; the products with keys and with values come on top":
                lambda n, m, ch: 2 * (n + m) * ch**2,
            "additions are counted too, twice as much; asked for are multiplications":
                lambda n, m, ch: 4 * (n + m) * ch**2 + 4 * n * m * ch,
            "the products cost n·m·ch, not n·m: each scalar product is ch multiplications":
                lambda n, m, ch: 2 * (n + m) * ch**2 + 2 * n * m,
            "a matrix costs ch² for each token, not ch": lambda n, m, ch: 2 * (n + m) * ch + 2 * n * m * ch,
            "the products are n·m·ch each, not n²·ch: the keys are those of the context":
                lambda n, m, ch: 2 * (n + m) * ch**2 + 2 * n * n * ch,
        },
        also=(lambda n, m, ch: 2 * ch * (n * ch + m * ch + n * m),
              lambda n, m, ch: sum((n * ch * ch, m * ch * ch, m * ch * ch, n * ch * m, n * m * ch, n * ch * ch)))),
}

"""Exercises of notebook 13, text and CLIP."""
import math

import torch
import torch.nn.functional as F

from minidiff.teach.check import Exercise


def cut(symbols, ranks):
    """Join the neighbours of the lowest rank, everywhere, until no neighbours have one."""
    word = list(symbols)
    while pairs := [pair for pair in zip(word, word[1:]) if pair in ranks]:
        best, out = min(pairs, key=ranks.get), []
        for symbol in word:
            if out and (out[-1], symbol) == best:
                out[-1] += symbol
            else:
                out.append(symbol)
        word = out
    return tuple(word)


def attend_causal(q, k, v):
    """softmax over j ≤ i of q_i·k_j/√d, times v: q, k (N,d), v (N,e) -> (N,e)."""
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    logits = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(later, -math.inf)
    return logits.softmax(1) @ v


def pooled(x, ids):
    """The vectors (B,D) of x (B,N,D) at the first place of the largest of ids (B,N)."""
    return x[torch.arange(len(x)), ids.argmax(1)]


def clip_loss(u, v, s):
    """Mean cross-entropy of rows and columns of exp(s)·cosines: u, v (N,P) -> a number."""
    u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
    logits = s.exp() * u @ v.T
    right = torch.arange(len(u))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def join(word, pair):
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def in_order(symbols, ranks):
    for pair in sorted(ranks, key=ranks.get):
        symbols = join(symbols, pair)
    return tuple(symbols)


def again_and_again(symbols, ranks, choose, whole=join):
    """Join the pair that `choose` picks among the neighbours that are merges, until there are none."""
    while pairs := [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]:
        symbols = whole(symbols, choose(pairs))
    return tuple(symbols)


def once(symbols, ranks):
    pairs = [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]
    return join(symbols, min(pairs, key=ranks.get)) if pairs else symbols


def first_place(word, pair):
    """Joins at the first place only."""
    for i in range(len(word) - 1):
        if (word[i], word[i + 1]) == pair:
            return (*word[:i], word[i] + word[i + 1], *word[i + 2:])
    return word


def longest(symbols, ranks):
    """From the left, the longest entry of the vocabulary that fits."""
    known, out, i = {"".join(pair) for pair in ranks}, [], 0
    while i < len(symbols):
        end = next((j for j in range(len(symbols), i + 1, -1) if "".join(symbols[i:j]) in known), i + 1)
        out.append("".join(symbols[i:end]))
        i = end
    return tuple(out)


def masked(q, k, v, hide=None, scale=None, dim=1, fill=-math.inf):
    """The solution with one part of it exchanged; hide: which logits, a matrix of booleans."""
    hide = torch.ones(len(q), len(q), dtype=torch.bool).triu(1) if hide is None else hide
    logits = (q @ k.T / (scale or math.sqrt(q.shape[1]))).masked_fill(hide, fill)
    return logits.softmax(dim) @ v


def square(n):
    return torch.ones(n, n, dtype=torch.bool)


def after_softmax(q, k, v, again=False):
    """Sets weights to 0 after the softmax, and brings rows back to sum 1 if `again`."""
    weights = (q @ k.T / math.sqrt(q.shape[1])).softmax(1).tril()
    return (weights / weights.sum(1, keepdim=True) if again else weights) @ v


def step_by_step(q, k, v):
    return torch.stack([(k[:i + 1] @ q[i] / len(q[i]) ** 0.5).softmax(0) @ v[:i + 1] for i in range(len(q))])


def loss(u, v, s, unit=lambda x: F.normalize(x, dim=1), scale=torch.exp, ways=(0.5, 0.5)):
    """The solution with one part of it exchanged; ways: the shares of rows and columns."""
    logits = scale(s) * unit(u) @ unit(v).T
    right = torch.arange(len(u))
    return sum(share * F.cross_entropy(each, right) for share, each in zip(ways, (logits, logits.T)) if share)


def by_formula(u, v, s):
    cosines = (u @ v.T) / (u.norm(dim=1)[:, None] * v.norm(dim=1))
    logits = math.exp(s) * cosines
    return (logits.logsumexp(0) + logits.logsumexp(1) - 2 * logits.diag()).mean() / 2


def parts(u, v, s):
    """Logits of the solution."""
    return s.exp() * F.normalize(u, dim=1) @ F.normalize(v, dim=1).T


def rows(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g) for shape in shapes)


LEARNED = [("o", "w"), ("l", "o"), ("w", "e"), ("ow", "e"), ("t", "h"), ("h", "e</w>"), ("u", "n"), ("s", "u"),
           ("m", "a"), ("a", "t</w>"), ("m", "at</w>"), ("a", "a"), ("aa", "aa")]
RANKS = {pair: i for i, pair in enumerate(LEARNED)}
WORDS = tuple((tuple(word), RANKS) for word in (
    ["l", "o", "w", "e", "r</w>"], ["t", "h", "e</w>"], ["s", "u", "n", "e</w>"], ["m", "a", "t</w>"],
    ["a", "a", "a", "a", "a", "a", "a</w>"], ["z</w>"]))
CAUSAL = (rows((6, 4), (6, 4), (6, 5)), rows((4, 9), (4, 9), (4, 3), seed=1))
IDS = (torch.tensor([[7, 2, 5, 8, 8, 8], [7, 8, 8, 8, 8, 8], [7, 3, 1, 6, 4, 8]]),
       torch.tensor([[17, 4, 18, 18, 18], [17, 5, 9, 18, 18]]))
POOL = ((*rows((3, 6, 4)), IDS[0]), (*rows((2, 5, 3), seed=1), IDS[1]))
LOSS = ((*rows((5, 7), (5, 7)), torch.tensor(1.3)), (*rows((4, 3), (4, 3), seed=1), torch.tensor(0.4)),
        (*rows((6, 2), (6, 2), seed=2), torch.tensor(2.0)))

EXERCISES = {
    "13.1": Exercise(
        "cutting by rank", 2, 10, cut, WORDS,
        wrong={
            "this joins the pair that stands first; of all neighbours the one that was learned first goes first":
                lambda w, r: again_and_again(w, r, lambda pairs: pairs[0]),
            "this takes the longest known piece from the left; pieces are made by the merges, in their order":
                longest,
            "the youngest merge goes first here: take the lowest rank, not the highest":
                lambda w, r: again_and_again(w, r, lambda pairs: max(pairs, key=r.get)),
            "this joins the pair that stands last; of all neighbours the one that was learned first goes first":
                lambda w, r: again_and_again(w, r, lambda pairs: pairs[-1]),
            "only one merge is made; go on until no neighbours can be joined": once,
            "nothing is joined yet": lambda w, r: w,
            "this is one text; wanted is a tuple of pieces": lambda w, r: "".join(cut(w, r)),
            "the pieces are right, but joined to one text again; give them as a tuple":
                lambda w, r: " ".join(cut(w, r)),
            "the mark </w> is lost: it belongs to the last piece, which is another one without it":
                lambda w, r: tuple(piece.removesuffix("</w>") for piece in cut(w, r)),
            "these are numbers of merges; wanted are the pieces":
                lambda w, r: tuple(r[pair] for pair in zip(w, w[1:]) if pair in r),
            "everything is joined to one piece; join only what is among the merges": lambda w, r: ("".join(w),),
        },
        also=(in_order, lambda w, r: again_and_again(w, r, lambda pairs: min(pairs, key=r.get), first_place),
              lambda w, r: list(cut(w, r)))),
    "13.2": Exercise(
        "causal attention", 2, 10, attend_causal, CAUSAL,
        wrong={
            "the mask is the wrong way round: this looks at itself and at what comes later":
                lambda q, k, v: masked(q, k, v, square(len(q)).tril(-1)),
            "the mask hides the token itself too, and the first has nothing to look at, 0/0: j = i is allowed":
                lambda q, k, v: masked(q, k, v, square(len(q)).triu(0)),
            "the mask is the wrong way round and hides the token itself: the last one gets 0/0":
                lambda q, k, v: masked(q, k, v, square(len(q)).tril(0)),
            "the mask lets every token see one token ahead: hide all with j > i":
                lambda q, k, v: masked(q, k, v, square(len(q)).triu(2)),
            "the mask is missing: every token sees all": lambda q, k, v: masked(q, k, v, ~square(len(q))),
            "the square root of d is missing": lambda q, k, v: masked(q, k, v, scale=1.0),
            "this divides by d; the temperature is its square root": lambda q, k, v: masked(q, k, v, scale=q.shape[1]),
            "this divides by the root of the number of tokens; d is the width":
                lambda q, k, v: masked(q, k, v, scale=math.sqrt(len(q))),
            "the softmax runs over the queries; it runs over the keys, along each row":
                lambda q, k, v: masked(q, k, v, dim=0),
            "hidden logits are set to 0, and e⁰ = 1 is a weight like others: set them to −∞":
                lambda q, k, v: masked(q, k, v, fill=0.0),
            "the weights are cut after the softmax, so that they do not add up to 1: mask the logits before it":
                after_softmax,
            "this averages the keys, not the values": lambda q, k, v: masked(q, k, k),
            "queries and keys are exchanged: row i belongs to query i": lambda q, k, v: masked(k, q, v),
            "these are the weights; the answer is the average of the values with them":
                lambda q, k, v: masked(q, k, torch.eye(len(q))),
            "the plain mean of what has been read: the queries have no say":
                lambda q, k, v: v.cumsum(0) / torch.arange(1, len(v) + 1)[:, None],
        },
        also=(step_by_step, lambda q, k, v: after_softmax(q, k, v, again=True),
              lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
              lambda q, k, v: masked(q, k, v, fill=-1e9))),
    "13.3": Exercise(
        "the pooled vector", 1, 5, pooled, POOL,
        wrong={
            "this takes the last of all tokens, the end of the padding: take the first end token":
                lambda x, ids: x[:, -1],
            "this takes the start token, which has read nothing but itself": lambda x, ids: x[:, 0],
            "this takes the token before the end, the last word": lambda x, ids: x[torch.arange(len(x)),
                                                                                    ids.argmax(1) - 1],
            "this takes the token behind the first end, which is padding":
                lambda x, ids: x[torch.arange(len(x)), (ids.argmax(1) + 1).clamp(max=ids.shape[1] - 1)],
            "this is the mean over all tokens, padding too; one token is asked for": lambda x, ids: x.mean(1),
            "this is the mean over the tokens up to the end; one token is asked for": lambda x, ids: torch.stack(
                [row[:end + 1].mean(0) for row, end in zip(x, ids.argmax(1))]),
            "x[:, place] takes every place from every row, (B,B,D); pair the row numbers with the places: "
            "x[torch.arange(B), place]": lambda x, ids: x[:, ids.argmax(1)],
            "these are the places of the end tokens; wanted are the vectors there": lambda x, ids: ids.argmax(1),
            "this takes the largest number of each channel; the ids say which token it is": lambda x, ids: x.amax(1),
            "this takes the smallest id; the end token has the largest":
                lambda x, ids: x[torch.arange(len(x)), ids.argmin(1)],
            "the place of the first row is used for all rows": lambda x, ids: x[:, int(ids[0].argmax())],
        },
        also=(lambda x, ids: torch.stack([row[i.tolist().index(i.max())] for row, i in zip(x, ids)]),
              lambda x, ids: x.gather(1, ids.argmax(1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0])),
    "13.4": Exercise(
        "CLIP's loss", 2, 15, clip_loss, LOSS,
        wrong={
            "only one direction: this asks which caption belongs to a picture; ask the columns too":
                lambda u, v, s: loss(u, v, s, ways=(1, 0)),
            "only one direction: this asks which picture belongs to a caption; ask the rows too":
                lambda u, v, s: loss(u, v, s, ways=(0, 1)),
            "both directions are added up; take their mean": lambda u, v, s: loss(u, v, s, ways=(1, 1)),
            "the vectors are not brought to length 1": lambda u, v, s: loss(u, v, s, unit=lambda x: x),
            "this normalises over the batch; bring each row to length 1":
                lambda u, v, s: loss(u, v, s, unit=lambda x: F.normalize(x, dim=0)),
            "this divides by the length of the whole batch; bring each row to length 1":
                lambda u, v, s: loss(u, v, s, unit=lambda x: x / x.norm()),
            "this takes the softmax of the vectors; bring each row to length 1":
                lambda u, v, s: loss(u, v, s, unit=lambda x: x.softmax(1)),
            "this divides by the squared length; divide by the length":
                lambda u, v, s: loss(u, v, s, unit=lambda x: x / x.square().sum(1, keepdim=True)),
            "s is the logarithm of the scale: take its exponential": lambda u, v, s: loss(u, v, s, scale=lambda s: s),
            "the scale is missing: the cosines are multiplied by exp(s)":
                lambda u, v, s: loss(u, v, s, scale=torch.ones_like),
            "this divides by exp(s); multiply": lambda u, v, s: loss(u, v, s, scale=lambda s: (-s).exp()),
            "the vectors are not brought to length 1, and s is not exponentiated":
                lambda u, v, s: loss(u, v, s, unit=lambda x: x, scale=lambda s: s),
            "not normalised, and only one direction": lambda u, v, s: loss(u, v, s, unit=lambda x: x, ways=(1, 0)),
            "one softmax over all N² entries; each row and each column has one of its own":
                lambda u, v, s: -(parts(u, v, s).diag() - parts(u, v, s).flatten().logsumexp(0)).mean(),
            "minus is missing: the loss is minus the logarithm": lambda u, v, s: -loss(u, v, s),
            "this adds up over the batch; take the mean": lambda u, v, s: len(u) * loss(u, v, s),
            "the diagonal is averaged over all N² entries; there are N right answers in each direction":
                lambda u, v, s: loss(u, v, s) / len(u),
            "one answer per question is asked for; this has one number for each pair, take the mean":
                lambda u, v, s: (parts(u, v, s).logsumexp(0) + parts(u, v, s).logsumexp(1)
                                 - 2 * parts(u, v, s).diag()) / 2,
            "these are probabilities; take minus their logarithm, then the mean":
                lambda u, v, s: (parts(u, v, s).softmax(0).diag() + parts(u, v, s).softmax(1).diag()).mean() / 2,
        },
        also=(by_formula, loss)),
}

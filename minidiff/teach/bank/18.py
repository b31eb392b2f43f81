"""Exercises of notebook 18, LoRA and textual inversion."""
import torch

from minidiff.teach.check import Exercise


def merged(weight, down, up, alpha, scale):
    """The product in the shape of the weight, times alpha over the rank and the strength, is added to the weight."""
    change = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return weight + scale * alpha / len(down) * change


def by_einsum(weight, down, up, alpha, scale):
    product = torch.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))
    return (weight.flatten(1) + product * (alpha * scale / up.shape[1])).reshape(weight.shape)


def added(factor, own=lambda weight, scale: weight):
    """A wrong merge: another factor, another part of the old weight."""
    def wrong(weight, down, up, alpha, scale):
        return own(weight, scale) + factor(down, up, alpha, scale) * (
            up.flatten(1) @ down.flatten(1)).view_as(weight)
    return wrong


def diagnosis(down, up):
    """What is added at first is the product; a gradient reaches each of the two through the other."""
    if (up @ down).any():
        return "harms at once"
    return "healthy" if down.any() or up.any() else "never learns"


def by_gradients(down, up):
    """The same from the sizes, asked the other way round."""
    learns = down.abs().sum() + up.abs().sum() > 0
    same = torch.equal(up @ down, torch.zeros(len(up), down.shape[1]))
    return ("healthy" if learns else "never learns") if same else "harms at once"


def one_file(first, second, c1, c2):
    """Stack along the rank; all numbers go into up."""
    (down1, up1, factor1), (down2, up2, factor2) = first, second
    return torch.cat([down1, down2]), torch.cat([c1 * factor1 * up1, c2 * factor2 * up2], 1)


def by_columns(first, second, c1, c2):
    downs, ups, numbers = zip(first, second)
    strength = torch.tensor([c * factor for c, factor, up in zip((c1, c2), numbers, ups) for _ in range(up.shape[1])])
    return torch.vstack(downs), torch.hstack(ups) * strength


def stacked(make):
    """A wrong file: make(down1, up1, factor1, down2, up2, factor2, c1, c2)."""
    return lambda first, second, c1, c2: make(*first, *second, c1, c2)


def extracted(delta, rank):
    """The largest singular values with their vectors; squares of singular values add up to the squares of delta."""
    u, values, vh = torch.linalg.svd(delta, full_matrices=False)
    nearest = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return nearest, values[:rank].square().sum() / values.square().sum()


def by_eigenvectors(delta, rank):
    _, vectors = torch.linalg.eigh(delta.T.double() @ delta.double())
    top = vectors[:, -rank:]
    nearest = (delta.double() @ top @ top.T).float()
    return nearest, nearest.square().sum() / delta.square().sum()


def cut(make):
    """A wrong approximation: make(u, values, vh, rank)."""
    return lambda delta, rank: make(*torch.linalg.svd(delta, full_matrices=False), rank)


def share_of(measure):
    """The right matrix and a wrong share: measure(values, rank)."""
    return lambda delta, rank: (extracted(delta, rank)[0], measure(torch.linalg.svdvals(delta), rank))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = ((drawn(5, 4), drawn(2, 4, seed=1), drawn(5, 2, seed=2), 3.0, 0.7),
          (drawn(5, 3, 3, 3), drawn(4, 3, 3, 3, seed=1), drawn(5, 4, 1, 1, seed=2), 1.0, 1.5),
          (drawn(6, 6), drawn(1, 6, seed=3), drawn(6, 1, seed=4), 8.0, -1.0))
A, B = drawn(2, 4, seed=5), drawn(3, 2, seed=6)
HALF = torch.tensor([[1.0], [0.0]])  # the first of two
ZERO = torch.zeros_like
STARTS = ((A, ZERO(B)), (ZERO(A), ZERO(B)), (A, B), (ZERO(A), B), (A * HALF, B * (1 - HALF.T)), (A, 1e-3 * B))
PAIRS = (((drawn(2, 4), drawn(5, 2, seed=1), 1.5), (drawn(2, 4, seed=2), drawn(5, 2, seed=3), 0.5), 0.8, 0.6),
         ((drawn(3, 6), drawn(2, 3, seed=1), 2.0), (drawn(3, 6, seed=2), drawn(2, 3, seed=3), 1.0), -1.0, 2.0))
CHANGES = ((drawn(6, 4), 2), (drawn(4, 7, seed=1), 1), (drawn(5, 5, seed=2), 3))

EXERCISES = {
    "18.1": Exercise(
        "a file merged by hand", 2, 10, merged, LAYERS,
        wrong={
            "the factor alpha/rank is missing": added(lambda down, up, alpha, scale: scale),
            "alpha alone is too much: it is divided by the rank": added(lambda down, up, alpha, scale: scale * alpha),
            "the factor is upside down: alpha over the rank": added(
                lambda down, up, alpha, scale: scale * len(down) / alpha),
            "this divides by the number of inputs, the last side of down; the rank is its first": added(
                lambda down, up, alpha, scale: scale * alpha / down.shape[-1]),
            "this divides by the number of outputs; the rank is the side that up and down share":
                added(lambda down, up, alpha, scale: scale * alpha / len(up)),
            "this divides by the root of the rank, as rsLoRA does; a kohya file means alpha/rank":
                added(lambda down, up, alpha, scale: scale * alpha / len(down) ** 0.5),
            "the strength counts twice, as if it were put into both halves": added(
                lambda down, up, alpha, scale: scale**2 * alpha / len(down)),
            "the strength is missing": added(lambda down, up, alpha, scale: alpha / len(down)),
            "this is the change alone; it is added to the weight": added(
                lambda down, up, alpha, scale: scale * alpha / len(down), lambda weight, scale: 0 * weight),
            "this fades the old weight out; the change is added to all of it": added(
                lambda down, up, alpha, scale: scale * alpha / len(down), lambda weight, scale: (1 - scale) * weight),
        },
        also=(by_einsum,)),
    "18.2": Exercise(
        "which start can learn?", 2, 10, diagnosis, STARTS,
        wrong={
            "down = 0 and up random is healthy too: the product is zero, and down learns first":
                lambda down, up: diagnosis(down, up) if down.any() or not up.any() else "harms at once",
            "up need not be zero: what counts is the product, and it is zero if either half is":
                lambda down, up: "harms at once" if up.any() else "healthy" if down.any() else "never learns",
            "with both at zero each gradient of (18.2) is zero, in every step: it never learns":
                lambda down, up: "harms at once" if (up @ down).any() else "healthy",
            "a random product is added to the layer before anything is learned: that harms at once":
                lambda down, up: "healthy" if down.any() or up.any() else "never learns",
            "a small product is still a change: the network is not the old one at first":
                lambda down, up: diagnosis(down, up) if (up @ down).abs().max() > 0.1 else
                "healthy" if down.any() or up.any() else "never learns",
            "look at the product: both may hold numbers and still cancel out to zero":
                lambda down, up: "harms at once" if down.any() and up.any() else diagnosis(down, up),
            "one half at zero does not stop the other: it gets a gradient in the first step":
                lambda down, up: "harms at once" if (up @ down).any() else "never learns",
            "the names are swapped: what starts as no change and can learn is healthy":
                lambda down, up: {"healthy": "never learns", "never learns": "healthy"}.get(
                    diagnosis(down, up), "harms at once"),
        },
        also=(by_gradients,)),
    "18.3": Exercise(
        "two LoRAs in one file", 3, 15, one_file, PAIRS,
        wrong={
            "adding the halves brings in cross terms: (B1 + B2)(A1 + A2) has four products, two are wanted":
                stacked(lambda a1, b1, f1, a2, b2, f2, c1, c2: (a1 + a2, c1 * f1 * b1 + c2 * f2 * b2)),
            "the factors of the two LoRAs are missing": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([a1, a2]), torch.cat([c1 * b1, c2 * b2], 1))),
            "the strengths are missing": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([a1, a2]), torch.cat([f1 * b1, f2 * b2], 1))),
            "the numbers stand in both halves, so they count twice": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([c1 * f1 * a1, c2 * f2 * a2]),
                                                        torch.cat([c1 * f1 * b1, c2 * f2 * b2], 1))),
            "the product is right, but the numbers stand in down; leave down as it is": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([c1 * f1 * a1, c2 * f2 * a2]),
                                                        torch.cat([b1, b2], 1))),
            "stacked along the inputs: down needs r1 + r2 rows, up as many columns": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([a1, a2], 1),
                                                        torch.cat([c1 * f1 * b1, c2 * f2 * b2]))),
            "down is stacked in one order and up in the other, so each down meets the other's up": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: (torch.cat([a1, a2]),
                                                        torch.cat([c2 * f2 * b2, c1 * f1 * b1], 1))),
            "this is the whole change, up @ down; the two halves are asked for": stacked(
                lambda a1, b1, f1, a2, b2, f2, c1, c2: c1 * f1 * b1 @ a1 + c2 * f2 * b2 @ a2),
        },
        also=(by_columns,)),
    "18.4": Exercise(
        "a fine-tune squeezed into a LoRA", 3, 15, extracted, CHANGES,
        wrong={
            "the share is that of the squares: they add up to the squares of delta, the values themselves do not":
                share_of(lambda values, rank: values[:rank].sum() / values.sum()),
            "this is the share that is lost": share_of(
                lambda values, rank: values[rank:].square().sum() / values.square().sum()),
            "no root: the share of the squares is asked for, not of the lengths": share_of(
                lambda values, rank: (values[:rank].square().sum() / values.square().sum()).sqrt()),
            "the singular values are left out: every direction then counts the same": cut(
                lambda u, values, vh, rank: (u[:, :rank] @ vh[:rank],
                                             values[:rank].square().sum() / values.square().sum())),
            "these are the smallest singular values; they come in falling order, take the first": cut(
                lambda u, values, vh, rank: ((u[:, -rank:] * values[-rank:]) @ vh[-rank:],
                                             values[-rank:].square().sum() / values.square().sum())),
            "the singular values count twice, as if each half held all of them": cut(
                lambda u, values, vh, rank: ((u[:, :rank] * values[:rank].square()) @ vh[:rank],
                                             values[:rank].square().sum() / values.square().sum())),
            "this cuts the matrix, not its spectrum: the first rows are no approximation of the rest":
                lambda delta, rank: (torch.cat([delta[:rank], 0 * delta[rank:]]),
                                     delta[:rank].square().sum() / delta.square().sum()),
            "torch.linalg.svd returns V transposed already: its first rows are wanted, not its first columns": cut(
                lambda u, values, vh, rank: ((u[:, :rank] * values[:rank]) @ vh[:, :rank].T if len(vh) == len(vh.T)
                                             else 0 * u @ vh, values[:rank].square().sum() / values.square().sum())),
            "the share is missing: the answer is (nearest, share)": lambda delta, rank: extracted(delta, rank)[0],
        },
        also=(by_eigenvectors,)),
}

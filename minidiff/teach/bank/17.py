"""Exercises of notebook 17, ControlNet."""
import torch

from minidiff.teach.check import Exercise


def residual_count(blocks):
    """One for the map of conv_in, for each residual block, for each step to a coarser resolution, for the middle."""
    return 1 + sum(blocks) + (len(blocks) - 1) + 1


def walked(blocks):
    kept = ["conv_in"]
    for level, n in enumerate(blocks):
        kept += [f"block {level}"] * n + ["down"] * (level + 1 < len(blocks))
    return len([*kept, "middle"])


def added(skips, middle, nets, scales):
    """Each ControlNet adds its residuals, times its own scale; the last of them belongs to the middle."""
    for residuals, scale in zip(nets, scales):
        skips = [skip + scale * r for skip, r in zip(skips, residuals)]
        middle = middle + scale * residuals[-1]
    return skips, middle


def summed(skips, middle, nets, scales):
    total = [sum(scale * r for scale, r in zip(scales, places)) for places in zip(*nets)]
    *maps, last = [own + more for own, more in zip([*skips, middle], total)]
    return maps, last


def steered(scaled=lambda own, scale, r: own + scale * r, for_middle=lambda own, scale, rs: own + scale * rs[-1],
            order=lambda rs: rs):
    """A wrong sum: another way to add to the maps, another to the middle, another order."""
    def wrong(skips, middle, nets, scales):
        for residuals, scale in zip(nets, scales):
            skips = [scaled(skip, scale, r) for skip, r in zip(skips, order(residuals))]
            middle = for_middle(middle, scale, residuals)
        return skips, middle
    return wrong


def diagnosis(table):
    """In step 1 nothing may reach the copy, in step 2 it must, and in step 3 the hint encoder must get its share."""
    (_, copy1, _), (_, copy2, _), (_, copy3, first3) = table
    if copy1 > 0:
        return "not zero"
    if copy2 == 0:
        return "dead"
    return "deaf" if first3 < 1e-3 * copy3 else "healthy"


def by_table(table):
    copy = [row[1] for row in table]
    named = {(False, True, True): "healthy", (False, False, False): "dead"}
    found = named.get(tuple(value > 0 for value in copy), "not zero")
    return "deaf" if found == "healthy" and table[2][2] / copy[2] < 0.001 else found


def slopes(x, ell, w_look, w_copy, w_out):
    """The chain rule: each slope is the product of what stands before the weight and what stands behind it."""
    seen = x + w_look * ell
    return w_out * w_copy * ell, w_out * seen, w_copy * seen


def by_autograd(*row):
    x, ell, *weights = (torch.tensor(float(value), requires_grad=True) for value in row)
    (weights[2] * weights[1] * (x + weights[0] * ell)).backward()
    return [weight.grad for weight in weights]


G = torch.Generator().manual_seed(0)
SKIPS, MIDDLE = list(torch.randn(3, 2, 4, generator=G)), torch.randn(2, 4, generator=G)
NETS = [list(torch.randn(4, 2, 4, generator=G)) for _ in range(2)]
HEALTHY = [[3e-3, 0.0, 0.0], [4e-3, 2e-5, 0.0], [3e-3, 5e-5, 6e-7]]
TABLES = (HEALTHY, [[2e-1, 0.0, 0.0], [3e-1, 6e-3, 0.0], [2e-1, 9e-3, 4e-4]],
          [[5e-3, 2e-4, 0.0], [4e-3, 3e-4, 1e-6], [4e-3, 2e-4, 3e-6]],
          [[5e-3, 2e-4, 1e-6], [4e-3, 3e-4, 1e-6], [4e-3, 2e-4, 3e-6]],
          [[3e-3, 0.0, 0.0], [3e-3, 0.0, 0.0], [4e-3, 0.0, 0.0]], [[0.0, 0.0, 0.0]] * 3,
          [[3e-3, 0.0, 0.0], [4e-3, 2e-5, 0.0], [3e-3, 5e-5, 4e-10]],
          [[2e-1, 0.0, 0.0], [3e-1, 6e-3, 0.0], [2e-1, 9e-3, 5e-7]])

EXERCISES = {
    "17.1": Exercise(
        "how many residuals", 1, 5, residual_count, (([2, 2, 2, 2],), ([1, 1, 1],), ([1, 3],), ([3],), ([2, 4, 10],)),
        wrong={
            "one is missing: conv_in's map is kept too, and the middle has a residual of its own":
                lambda blocks: sum(blocks) + len(blocks),
            "each step to a coarser resolution makes a map too, and it is kept": lambda blocks: sum(blocks) + 2,
            "one too many: after the coarsest resolution there is no step to a coarser one":
                lambda blocks: sum(blocks) + len(blocks) + 2,
            "these are the residual blocks alone": sum,
            "the steps to coarser resolutions and one more are missing: count conv_in's map, and the middle":
                lambda blocks: sum(blocks) + 1,
            "these are the resolutions; a resolution keeps several maps": len,
            "the resolutions may have different numbers of blocks; add them up":
                lambda blocks: len(blocks) * blocks[0] + len(blocks) + 1,
            "the way up is not copied and gets no zero convolutions":
                lambda blocks: 2 * (sum(blocks) + len(blocks)) + 1,
            "the two additional maps are missing: conv_in's and the middle's":
                lambda blocks: sum(blocks) + len(blocks) - 1,
        },
        also=(walked,)),
    "17.2": Exercise(
        "two ControlNets, repaired", 2, 10, added,
        ((SKIPS, MIDDLE, NETS, [1.0, 0.5]), (SKIPS, MIDDLE, NETS[:1], [2.0]), (SKIPS, MIDDLE, NETS, [0.0, 0.7])),
        wrong={
            "this is the broken version: the scale multiplies the U-Net's own maps, and nothing reaches the middle":
                steered(lambda own, scale, r: scale * (own + r), lambda own, scale, rs: own),
            "nothing reaches the middle: zip ends with the shorter list, and the last residual is lost":
                steered(for_middle=lambda own, scale, rs: own),
            "the scale multiplies the U-Net's own maps too: at scale 0 nothing is left of the picture":
                steered(lambda own, scale, r: scale * (own + r), lambda own, scale, rs: scale * (own + rs[-1])),
            "at scale 0 the U-Net's own maps must stay as they are: the scale belongs to the residual alone":
                steered(lambda own, scale, r: scale * (own + r)),
            "the scale of the middle's residual is missing":
                steered(for_middle=lambda own, scale, rs: own + rs[-1]),
            "the middle's residual takes its place; it is to be added":
                steered(for_middle=lambda own, scale, rs: scale * rs[-1]),
            "the middle gets the first residual, and as a whole; its own is the last, and is added":
                steered(for_middle=lambda own, scale, rs: rs[0]),
            "the maps are right, but the middle is scaled as a whole; only the residual is to be scaled":
                steered(for_middle=lambda own, scale, rs: scale * (own + rs[-1])),
            "each ControlNet starts again from the U-Net's own maps, so only the last one counts":
                lambda skips, middle, nets, scales: added(skips, middle, nets[-1:], scales[-1:]),
            "all ControlNets have the first one's scale; each has its own":
                lambda skips, middle, nets, scales: added(skips, middle, nets, scales[:1] * len(nets)),
            "the residuals stand in the order of the maps, the finest first; here they are turned round":
                steered(order=lambda rs: rs[:-1][::-1]),
            "the middle gets the first residual; its own is the last": steered(
                for_middle=lambda own, scale, rs: own + scale * rs[0]),
            "the residuals add up; here they are averaged": lambda skips, middle, nets, scales: added(
                skips, middle, nets, [scale / len(nets) for scale in scales]),
            "the residuals take the place of the U-Net's maps; they are to be added":
                steered(lambda own, scale, r: scale * r, lambda own, scale, rs: scale * rs[-1]),
            "the scales are not used": lambda skips, middle, nets, scales: added(
                skips, middle, nets, [1.0] * len(nets)),
        },
        also=(summed,)),
    "17.3": Exercise(
        "name the broken run", 2, 10, diagnosis, tuple((table,) for table in TABLES),
        wrong={
            "you look for the copy's gradient in step 1; there it is 0 in every run that starts right":
                lambda table: "dead" if table[0][1] == 0 else "not zero",
            "a healthy run is called deaf: in step 3, not sooner, compare the first layer's gradient with the copy's":
                lambda table: diagnosis(table) if diagnosis(table) in ("dead", "not zero") else
                "deaf" if table[1][2] < 1e-3 * table[1][1] else "healthy",
            "a run that starts right is called not zero: in step 2 the copy should get a gradient; look at step 1":
                lambda table: "not zero" if table[1][1] > 0 else "dead",
            "a dead run is called deaf: ask whether the copy gets anything before you compare with it":
                lambda table: "not zero" if table[0][1] > 0 else
                "deaf" if table[2][2] <= 1e-3 * table[2][1] else "healthy",
            "the size alone says nothing, since losses differ in scale: compare with the copy's gradient":
                lambda table: diagnosis(table) if diagnosis(table) in ("dead", "not zero") else
                "deaf" if table[2][2] < 1e-6 else "healthy",
            "deaf runs are called healthy: look at the hint encoder's first layer in step 3":
                lambda table: "healthy" if diagnosis(table) == "deaf" else diagnosis(table),
            "a gradient of the zero convolutions does not say that they move: dead shows in the copy, in step 2":
                lambda table: "dead" if table[0][0] == 0 else
                diagnosis(table) if diagnosis(table) != "dead" else "healthy",
            "not zero shows in the copy's column: in step 1 no gradient may pass a convolution that is zero":
                lambda table: diagnosis(table) if diagnosis(table) != "not zero" else "healthy",
        },
        also=(by_table,)),
    "17.4": Exercise(
        "slopes of two zeros", 2, 10, slopes,
        ((0.7, 2.0, 0.0, 1.5, 0.0), (0.0, 2.0, 0.0, 1.5, 0.0), (0.7, 2.0, 0.3, 1.5, -0.4), (-1.1, 0.5, 0.0, 0.6, 0.2)),
        wrong={
            "the copy sees x as well: without it nothing would ever reach w_out":
                lambda x, l, a, b, c: (c * b * l, c * a * l, b * a * l),
            "x does not depend on w_look, so it is not in its slope": lambda x, l, a, b, c: (
                c * b * (x + l), c * (x + a * l), b * (x + a * l)),
            "a slope does not hold the weight itself: each is multiplied by its own weight here":
                lambda x, l, a, b, c: (a * c * b * l, b * c * (x + a * l), c * b * (x + a * l)),
            "w_out stands behind w_look and multiplies its slope": lambda x, l, a, b, c: (
                b * l, c * (x + a * l), b * (x + a * l)),
            "w_copy stands between the two: it is in both other slopes": lambda x, l, a, b, c: (
                c * l, c * (x + a * l), x + a * l),
            "the order is w_look, w_copy, w_out": lambda *row: slopes(*row)[::-1],
            "the hint is forgotten in what the copy sees, x + w_look·ell": lambda x, l, a, b, c: (
                c * b * l, c * x, b * x),
            "w_out does not stand before w_copy's slope here; it should": lambda x, l, a, b, c: (
                c * b * l, x + a * l, b * (x + a * l)),
        },
        also=(by_autograd,)),
}

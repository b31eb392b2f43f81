"""Exercises of notebook 14, latent diffusion."""
import torch

from minidiff.teach.check import Exercise


def noisy_latent(mean, std, e, eps, f, alpha, sigma):
    """z_t of (14.1): (B,C,h,w); alpha, sigma: (B,1,1,1)."""
    return alpha * f * (mean + std * e) + sigma * eps


def drop_captions(context, empty, dropped):
    """(B,77,D) -> (B,77,D): the rows where `dropped` (B,) is true are the empty prompt (77,D)."""
    return torch.where(dropped[:, None, None], empty, context)


def inside(maps, mask):
    """maps, mask: (B,h,w) -> (B,), the share of each map's sum that lies in its mask."""
    return (maps * mask).sum((1, 2)) / maps.sum((1, 2))


def by_loop(context, empty, dropped):
    return torch.stack([empty if gone else row for row, gone in zip(context, dropped.tolist())])


G = torch.Generator().manual_seed(0)
LATENT = (*torch.randn(4, 2, 3, 4, 5, generator=G).abs().mul(torch.tensor([1.0, 0.3, 1.0, 1.0]).view(4, 1, 1, 1, 1)),
          0.7, torch.tensor([0.9, 0.2]).view(2, 1, 1, 1), torch.tensor([0.43589, 0.97980]).view(2, 1, 1, 1))
CAPTIONS = (torch.randn(5, 7, 3, generator=G), torch.randn(7, 3, generator=G),
            torch.tensor([True, False, False, True, False]))
MAPS = (torch.rand(3, 4, 5, generator=G), (torch.rand(3, 4, 5, generator=G) < 0.3).float())

EXERCISES = {
    "14.1": Exercise(
        "the noisy latent", 2, 10, noisy_latent, (LATENT,),
        wrong={
            "the scale factor is missing: the diffusion model sees latents of unit variance, f times the VAE's":
                lambda m, s, e, eps, f, a, b: a * (m + s * e) + b * eps,
            "divided by f: that is the way back, before decoding":
                lambda m, s, e, eps, f, a, b: a * (m + s * e) / f + b * eps,
            "f belongs to the draw as well, not to its mean alone":
                lambda m, s, e, eps, f, a, b: a * (f * m + s * e) + b * eps,
            "f scales the noise of the process too; only the latent is scaled":
                lambda m, s, e, eps, f, a, b: f * (a * (m + s * e) + b * eps),
            "one noise for both: the draw has its own, e, the process eps":
                lambda m, s, e, eps, f, a, b: a * f * (m + s * eps) + b * eps,
            "the two noises are exchanged": lambda m, s, e, eps, f, a, b: a * f * (m + s * eps) + b * e,
            "nothing is drawn: this uses the mean alone": lambda m, s, e, eps, f, a, b: a * f * m + b * eps,
            "std is taken for a variance; it is the standard deviation already":
                lambda m, s, e, eps, f, a, b: a * f * (m + s.sqrt() * e) + b * eps,
            "alpha and sigma are exchanged": lambda m, s, e, eps, f, a, b: b * f * (m + s * e) + a * eps,
            "alpha and sigma are amplitudes already; leave the square roots out":
                lambda m, s, e, eps, f, a, b: a.sqrt() * f * (m + s * e) + b.sqrt() * eps,
            "this is z_0; it still has to be noised": lambda m, s, e, eps, f, a, b: f * (m + s * e),
        },
        also=(lambda m, s, e, eps, f, a, b: b * eps + torch.addcmul(m, s, e) * (a * f),)),
    "14.2": Exercise(
        "caption dropout", 1, 5, drop_captions, (CAPTIONS,),
        wrong={
            "the wrong ones are kept: where `dropped` is true the caption goes":
                lambda c, n, d: torch.where(d[:, None, None], c, n),
            "zeros are not the empty prompt: when drawing, the network is told the encoding of \"\"":
                lambda c, n, d: c * (~d)[:, None, None],
            "all captions are gone: choose row by row": lambda c, n, d: n.expand_as(c),
            "no caption was dropped": lambda c, n, d: c.clone(),
            "the rows are gone; the batch has to keep its size, with the empty prompt in them": lambda c, n, d: c[~d],
            "the empty prompt is added to the caption; it takes its place":
                lambda c, n, d: c + d[:, None, None] * n,
            "only the first vector is exchanged; all of them belong to the prompt":
                lambda c, n, d: torch.cat([drop_captions(c, n, d)[:, :1], c[:, 1:]], 1),
        },
        also=(by_loop, lambda c, n, d: c + d[:, None, None] * (n - c))),
    "14.3": Exercise(
        "attention inside a mask", 1, 5, inside, (MAPS,),
        wrong={
            "divided by the mask's area: that is the mean attention inside, not the share of the word's attention":
                lambda a, m: (a * m).sum((1, 2)) / m.sum((1, 2)),
            "divided by the number of places: divide by the sum of the map": lambda a, m: (a * m).mean((1, 2)),
            "not divided at all: a bright word is not a word at the right place": lambda a, m: (a * m).sum((1, 2)),
            "this is what lies outside": lambda a, m: 1 - inside(a, m),
            "one number for the whole batch: sum over each map's places only":
                lambda a, m: (a * m).sum() / a.sum(),
            "the share of the area: the map is not used": lambda a, m: m.mean((1, 2)),
            "divided place by place, and then summed: this counts the mask": lambda a, m: (a * m / a).sum((1, 2)),
        },
        also=(lambda a, m: torch.einsum("bij,bij->b", a / a.sum((1, 2), keepdim=True), m),)),
}

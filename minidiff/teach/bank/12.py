"""Exercises of notebook 12, the variational autoencoder."""
import torch

from minidiff.teach.check import Exercise


def kl_of(mean, logvar):
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)) of each picture in nats: mean, logvar (B,...) -> (B,)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def draw_latent(mean, logvar, noise):
    """mean + standard deviation times noise."""
    return mean + torch.exp(0.5 * logvar) * noise


def water(variances, level):
    """Reverse water-filling: variances (N,), level -> rates in nats and distortions, (N,) each."""
    return (0.5 * torch.log(variances / level)).clamp(min=0), variances.clamp(max=level)


def both_ways(mean, logvar, noise, s, drawn):
    """The sample of q scaled for the diffusion model, and a latent of the diffusion model scaled back."""
    return s * (mean + torch.exp(0.5 * logvar) * noise), drawn / s


def asking(mean, logvar, noise):  # for their gradients: the check compares these too
    return mean.requires_grad_(), logvar.requires_grad_(), noise


def total(each):
    return each.flatten(1).sum(1)


def by_torch(mean, logvar):
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).reshape(len(mean), -1).sum(1)


def by_loop(variances, level):
    pairs = [(0.5 * torch.log(v / level), torch.tensor(level)) if v > level else (torch.tensor(0.0), v)
             for v in variances]
    return torch.stack([rate for rate, _ in pairs]), torch.stack([lost for _, lost in pairs])


def std_of(logvar):
    return torch.exp(0.5 * logvar)


g = torch.Generator().manual_seed(12)
KL = ((torch.randn(3, 5, generator=g), torch.rand(3, 5, generator=g) * 2 + 0.2),
      (torch.randn(2, 4, 3, 5, generator=g), torch.randn(2, 4, 3, 5, generator=g) - 1))
DRAWS = (asking(torch.tensor([[0.3, -1.2, 2.0]]), torch.tensor([[0.7, 1.9, 0.4]]), torch.tensor([[1.3, -0.6, 0.8]])),
         asking(*(torch.randn(2, 4, 3, 5, generator=g) for _ in range(3))))
WELLS = (torch.tensor([0.2, 7.5, 1.4, 0.9, 40.0]), 1.2), (torch.tensor([5.0, 0.3, 0.26, 0.02]), 0.25)
WAYS = tuple((*[torch.randn(shape, generator=g) for _ in range(3)], s, torch.randn(shape, generator=g))
             for shape, s in (((2, 4, 3, 5), 0.18215), ((1, 3, 2, 6), 0.4)))

EXERCISES = {
    "12.1": Exercise(
        "the KL divergence from the standard normal", 1, 5, kl_of, KL,
        wrong={
            "logvar is taken for the variance; the variance is its exponential":
                lambda m, v: total(0.5 * (m**2 + v - 1 - v.log())),
            "logvar is taken for the variance in one place: the term v is its exponential":
                lambda m, v: total(0.5 * (m**2 + v - 1 - v)),
            "logvar is taken for the standard deviation; the variance is its exponential":
                lambda m, v: total(0.5 * (m**2 + v**2 - 1 - (v**2).log())),
            "logvar is taken for the logarithm of the standard deviation; it is that of the variance: v = exp(logvar)":
                lambda m, v: total(0.5 * (m**2 + (2 * v).exp() - 1 - 2 * v)),
            "v is the variance, exp(logvar); with exp(½·logvar) the standard deviation stands in its place":
                lambda m, v: total(0.5 * (m**2 + std_of(v) - 1 - v)),
            "the sign is wrong: a KL divergence is never negative": lambda m, v: -kl_of(m, v),
            "the −1 is forgotten: at mean 0 and variance 1 the divergence has to be 0":
                lambda m, v: total(0.5 * (m**2 + v.exp() - v)),
            "the −1 belongs to every latent number, not once to the sum":
                lambda m, v: 0.5 * (total(m**2 + v.exp() - v) - 1),
            "the ½ is missing": lambda m, v: 2 * kl_of(m, v),
            "this is −2 times the divergence: 1 + log v − µ² − v still wants the factor −½":
                lambda m, v: -2 * kl_of(m, v),
            "the ½ belongs to all four terms": lambda m, v: total(0.5 * m**2 + v.exp() - 1 - v),
            "the mean has to be squared": lambda m, v: total(0.5 * (m + v.exp() - 1 - v)),
            "the mean is missing: a code that sits elsewhere than at 0 tells something too":
                lambda m, v: total(0.5 * (v.exp() - 1 - v)),
            "log v is subtracted, not added": lambda m, v: total(0.5 * (m**2 + v.exp() - 1 + v)),
            "log v is missing: it is what makes a narrow code dear": lambda m, v: total(0.5 * (m**2 + v.exp() - 1)),
            "this is the divergence the other way round, of N(0, 1) from q":
                lambda m, v: total(0.5 * ((1 + m**2) / v.exp() - 1 + v)),
            "this is the mean over the latent numbers; the rate of a picture is their sum. A KL weight means another "
            "thing with it": lambda m, v: kl_of(m, v) / m[0].numel(),
            "this is one number for the whole batch, the sum; one per picture is asked for":
                lambda m, v: kl_of(m, v).sum(),
            "this is one number for the whole batch, the mean over pictures; one per picture is asked for":
                lambda m, v: kl_of(m, v).mean(),
            "this is one number for the whole batch, the mean over everything; a sum per picture is asked for":
                lambda m, v: kl_of(m, v).mean() / m[0].numel(),
            "this is the divergence of each latent number; add them up for each picture":
                lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v),
            "of a map this adds up one axis only: all axes but the first belong to a picture":
                lambda m, v: (0.5 * (m**2 + v.exp() - 1 - v)).sum(1),
            "of a map this adds up the last axis only: all axes but the first belong to a picture":
                lambda m, v: (0.5 * (m**2 + v.exp() - 1 - v)).sum(-1),
            "this adds up over the batch; add up over everything else": lambda m, v: (
                0.5 * (m**2 + v.exp() - 1 - v)).sum(0),
        },
        also=(by_torch, lambda m, v: -0.5 * torch.stack([(1 + b - a.square() - b.exp()).sum() for a, b in zip(m, v)]))),
    "12.2": Exercise(
        "a latent from outside noise", 1, 5, draw_latent, DRAWS,
        wrong={
            "the ½ is missing: exp(logvar) is the variance, and noise is multiplied by the standard deviation":
                lambda m, v, e: m + v.exp() * e,
            "logvar itself is taken for the standard deviation; that is exp(½·logvar)": lambda m, v, e: m + v * e,
            "logvar is taken for the variance here; its root is not the standard deviation, exp(½·logvar) is":
                lambda m, v, e: m + v.sqrt() * e,
            "half of logvar is the logarithm of the standard deviation; the exponential is missing":
                lambda m, v, e: m + 0.5 * v * e,
            "this divides by the standard deviation, or has the wrong sign in the exponent; multiply by exp(½·logvar)":
                lambda m, v, e: m + torch.exp(-0.5 * v) * e,
            "the exponent is ½·logvar, not 2·logvar": lambda m, v, e: m + torch.exp(2 * v) * e,
            "the ½ belongs into the exponent, not in front": lambda m, v, e: m + 0.5 * v.exp() * e,
            "the mean is missing": lambda m, v, e: std_of(v) * e,
            "the mean is shifted by the noise before it is multiplied; only the noise is multiplied":
                lambda m, v, e: std_of(v) * (m + e),
            "the noise is missing: this adds the standard deviation itself": lambda m, v, e: m + std_of(v),
            "this is the mean: nothing is drawn": lambda m, v, e: m.clone(),
            "the noise is subtracted. That has the same distribution, but (12.5) adds it":
                lambda m, v, e: m - std_of(v) * e,
            "this draws noise of its own; use the one that is given, so that the draw can be repeated":
                lambda m, v, e: m + std_of(v) * torch.randn_like(m),
            "this goes back from a latent to its noise; here it is the other way":
                lambda m, v, e: (e - m) / std_of(v),
            "mean and log-variance are swapped": lambda m, v, e: v + std_of(m) * e,
            "the numbers are right, but no gradient comes back to mean and logvar: something detaches the latent":
                lambda m, v, e: draw_latent(m, v, e).detach(),
            "the numbers are right, but no gradient comes back to logvar: the standard deviation is detached":
                lambda m, v, e: draw_latent(m, v.detach(), e),
            "the numbers are right, but no gradient comes back to the mean: it is detached":
                lambda m, v, e: draw_latent(m.detach(), v, e),
        },
        also=(lambda m, v, e: v.exp().sqrt() * e + m, lambda m, v, e: torch.addcmul(m, v.div(2).exp(), e))),
    "12.3": Exercise(
        "the best linear code", 2, 10, water, WELLS,
        wrong={
            "the distortions are right; in the rates the ½ is missing": lambda v, s: (
                2 * water(v, s)[0], water(v, s)[1]),
            "the rates are in bits; nats are asked for, the natural logarithm": lambda v, s: (
                (0.5 * torch.log2(v / s)).clamp(min=0), v.clamp(max=s)),
            "some rates are negative: a direction that is not worth telling has the rate 0":
                lambda v, s: (0.5 * torch.log(v / s), v.clamp(max=s)),
            "some rates are negative, and some distortions larger than the variance: what is not told costs its "
            "variance": lambda v, s: (0.5 * torch.log(v / s), torch.full_like(v, s)),
            "the ratio is upside down: the rate is that of variance over level":
                lambda v, s: ((0.5 * torch.log(s / v)).clamp(min=0), v.clamp(max=s)),
            "½·log(1 + variance/level) is the capacity of a channel with noise; here it is ½·log(variance/level)":
                lambda v, s: (0.5 * torch.log1p(v / s), v.clamp(max=s)),
            "the rates are right; where nothing is told the distortion is the variance, which is below the level":
                lambda v, s: (water(v, s)[0], torch.full_like(v, s)),
            "the rates are right; where something is told the distortion is the level, not the variance":
                lambda v, s: (water(v, s)[0], v.clone()),
            "the rates are right; this is the larger of variance and level, the distortion is the smaller":
                lambda v, s: (water(v, s)[0], v.clamp(min=s)),
            "the rates are right; this is what is kept of the variance, the distortion is what is lost":
                lambda v, s: (water(v, s)[0], (v - s).clamp(min=0)),
            "the two are swapped: rates first": lambda v, s: water(v, s)[::-1],
            "the level is a variance, s², already: do not square it":
                lambda v, s: water(v, s * s),
            "these are the sums; one rate and one distortion per direction are asked for":
                lambda v, s: tuple(part.sum() for part in water(v, s)),
        },
        also=(by_loop, lambda v, s: (0.5 * torch.log(v.clamp(min=s) / s), torch.where(v > s, s, v)))),
    "12.4": Exercise(
        "the scale factor, both ways", 1, 5, both_ways, WAYS,
        wrong={
            "the scale factor is forgotten in both directions": lambda m, v, e, s, d: (draw_latent(m, v, e), d.clone()),
            "the factor is forgotten on the way to the diffusion model": lambda m, v, e, s, d: (
                draw_latent(m, v, e), d / s),
            "the factor is forgotten on the way to the decoder: the picture would be pale":
                lambda m, v, e, s, d: (s * draw_latent(m, v, e), d.clone()),
            "multiplied on the way to the decoder; it has to be undone, so divide":
                lambda m, v, e, s, d: (s * draw_latent(m, v, e), s * d),
            "the two directions are swapped: multiply for the diffusion model, divide for the decoder":
                lambda m, v, e, s, d: (draw_latent(m, v, e) / s, s * d),
            "divided in both directions: s is 1 over the standard deviation, so for the diffusion model multiply":
                lambda m, v, e, s, d: (draw_latent(m, v, e) / s, d / s),
            "only the mean is scaled; the noise of the draw belongs to the latent and is scaled with it":
                lambda m, v, e, s, d: (s * m + std_of(v) * e, d / s),
            "only the noise is scaled, not the mean": lambda m, v, e, s, d: (m + s * std_of(v) * e, d / s),
            "this scales the mean and draws nothing": lambda m, v, e, s, d: (s * m, d / s),
            "the ½ is missing: exp(logvar) is the variance, and noise is multiplied by the standard deviation":
                lambda m, v, e, s, d: (s * (m + v.exp() * e), d / s),
            "the root of the factor is taken; latents are amplitudes, and so is s": lambda m, v, e, s, d: (
                s**0.5 * draw_latent(m, v, e), d / s**0.5),
            "the factor is squared; latents are amplitudes, and so is s": lambda m, v, e, s, d: (
                s * s * draw_latent(m, v, e), d / s**2),
            "logvar is scaled before the exponential; scale the latent that was drawn":
                lambda m, v, e, s, d: (s * m + torch.exp(0.5 * s * v) * e, d / s),
            "the two are in the wrong order: first what the diffusion model wants, then what the decoder wants":
                lambda m, v, e, s, d: both_ways(m, v, e, s, d)[::-1],
        },
        also=(lambda m, v, e, s, d: (m * s + v.exp().sqrt() * s * e, d * (1 / s)),
              lambda m, v, e, s, d: [torch.addcmul(m, std_of(v), e).mul(s), d.div(s)])),
}

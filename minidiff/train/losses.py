"""The training losses: noise prediction and the bound behind it, consistency, KL-VAE with its critic, contrastive."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.grid import Grid
from minidiff.prediction import Pred, coefficients, moved, split, target
from minidiff.samplers import euler
from minidiff.schedule import Level


def diffusion(net: Callable, kind: str, schedule: Callable, x0: Tensor, t: Tensor, eps: Tensor, **cond) -> Tensor:
    """L_simple per picture: mean |net(k·(alpha·x0 + sigma·eps), t) − target|² (DDPM, arXiv 2006.11239, eq. 14).

    k moves the state to the coordinates of `prediction.moved`, as `prediction.denoiser` will when the net draws: 1 on a
    variance-preserving schedule for eps, x0, v and on the straight path for flow. For edm with `schedule.EDM` it is
    c_in, and this is the loss of Karras et al. (arXiv 2206.00364, eq. 8) with the weight λ = 1/c_out².

    Args:
        net: callable (x, t, **cond) -> out, raw prediction.
        kind: what the net predicts: eps, x0, v, flow or edm.
        schedule: t -> (alpha, sigma), (B,) each: Discrete, Flow or EDM.
        x0: clean data (B,...). eps: unit noise, the same shape.
        t: (B,) what the net is fed: integers in 0…T−1 for Discrete, floats in 0…T for Flow, ln(nsr)/4 for EDM.

    Returns:
        (B,) losses, one per picture.

    Matches: the published preconditioning on copied nets, tests/test_losses.py.

    >>> from minidiff.schedule import SD
    >>> x0, eps, t = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 999])
    >>> diffusion(lambda x, t: torch.zeros_like(x), "eps", SD, x0, t, eps)   # predicts no noise: loss 1
    tensor([1., 1.])
    """
    alpha, sigma = (c.to(x0).view(-1, *[1] * (x0.ndim - 1)) for c in schedule(t))
    k = moved(kind, alpha, sigma)
    k = torch.where((k - 1).abs() > 1e-6, k, 1.0)  # rounding is no move, there as here
    alpha, sigma = k * alpha, k * sigma
    out = net(alpha * x0 + sigma * eps, t, **cond)
    return (out.float() - target(kind, x0, eps, alpha, sigma)).square().flatten(1).mean(1)


def edm_times(z: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Training times for `schedule.EDM`: ln(nsr) = mean + std·z, t = ln(nsr)/4 (arXiv 2206.00364, table 1).

    Args:
        z: unit noise (B,).

    >>> edm_times(torch.tensor([0.0, 1.0]))
    tensor([-0.3000,  0.0000])
    """
    return (mean + std * z) / 4


def implied_weight(kind: str, alpha: float | Tensor, sigma: float | Tensor) -> float | Tensor:
    """How much an error of eps counts in the loss of another kind: |out − target|² = weight·|eps error|².

        weight = (q − p·sigma/alpha)²   with the row (p, q) of `prediction.coefficients`, as alpha·δx0 = −sigma·δeps

    x0: 1/SNR, v: 1/alpha², flow: (1 + sigma/alpha)² (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    >>> implied_weight("eps", 0.8, 0.6), round(implied_weight("v", 0.8, 0.6), 4)
    (1.0, 1.5625)
    """
    p, q = coefficients(kind, alpha, sigma)
    return (q - p * sigma / alpha) ** 2


def min_snr(kind: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """The factor on the loss of a kind that makes an error of x0 count min(SNR, gamma), SNR = alpha²/sigma².

    Hang et al. 2023 (arXiv 2303.09556, section 3.4): eps: min(SNR, γ)/SNR, x0: min(SNR, γ), v: min(SNR, γ)/(SNR + 1).

    >>> min_snr("eps", torch.tensor([0.995, 0.6]), torch.tensor([0.1, 0.8]))
    tensor([0.0505, 1.0000])
    """
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) / (snr * implied_weight(kind, alpha, sigma))


def posterior(now: Level, nxt: Level) -> tuple[float, float, float]:
    """q(x_nxt | x_now, x0) = N(on_x·x_now + on_x0·x0, variance·I): one step back, for who knows x0 (DDPM, eq. 7).

        on_x = r²·alpha'/alpha,  on_x0 = alpha'·(1 − r²),  variance = sigma'²·(1 − r²),  r = sigma'·alpha/(alpha'·sigma)

    Args:
        now, nxt: levels with sigma > 0 and sigma' ≥ 0, nxt nearer to the data; they need not be neighbours.

    Returns:
        on_x, on_x0, variance

    >>> [round(c, 4) for c in posterior(Level(1.0, 0.6, 0.8), Level(0.0, 0.8, 0.6))]
    [0.4219, 0.5469, 0.2461]
    """
    (_, a, s), (_, a1, s1) = now, nxt
    r2 = (s1 * a / (a1 * s)) ** 2
    return s1 * s1 * a / (a1 * s * s), a1 * (1 - r2), s1 * s1 * (1 - r2)


def vlb(denoise: Callable, x0: Tensor, grid: Grid, variances: Sequence[float],
        noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """The terms of the variational bound −log p(x0) ≤ Σ terms, in nats (DDPM, arXiv 2006.11239, eq. 5).

        KL(q(x_T|x0) ‖ N(0, I)) + Σ KL(q(x_nxt|x_now, x0) ‖ N(mean, variance)) − log N(x0; guess, variance)

    with the mean of the posterior in which the guess of x0 stands for x0. Each term is seen at one random state, so a
    sum over fewer levels, or an average over several calls, estimates the bound; per dimension and in bits, divide by
    D·ln 2. The bound is that of a density: x0 are real numbers, not one of 256 values.

    Args:
        denoise: (x, level) -> Pred. x0: (B,...).
        grid: variance-preserving, from noise to the lowest level of training, sigma > 0 (DDPM's x_T … x_1).
        variances: of the model's step away from each level, len(grid) of them; `fixed_small`, `fixed_large`, or yours.
        noise: like -> unit noise.

    Returns:
        (len(grid) + 1, B): the prior's term first, that of the last step, to x0, at the end.

    Matches: the exact likelihood of a Gaussian with its optimal variances, tests/test_losses.py.

    >>> from minidiff.grid import Level
    >>> grid = Grid([Level(1.0, 0.6, 0.8), Level(0.0, 0.8, 0.6)])
    >>> knows = lambda x, level: (torch.ones_like(x), None)                  # all data is 1, and it knows
    >>> vlb(knows, torch.ones(1, 1), grid, fixed_large(grid))[1:-1]
    tensor([[0.0689]])
    """
    dims, axes = x0[0].numel(), tuple(range(1, x0.ndim))
    _, alpha, sigma = grid[0]
    terms = [0.5 * (dims * (sigma**2 - 1 - 2 * math.log(sigma)) + alpha**2 * x0.square().sum(axes))]
    for now, nxt, v in zip(grid, [*grid[1:], Level(0.0, 1.0, 0.0)], variances, strict=True):
        _, on_x0, w = posterior(now, nxt)
        guess = denoise(now.alpha * x0 + now.sigma * noise(x0), now)[0]
        off = (on_x0 * (guess - x0)).square().sum(axes)                                   # |difference of means|²
        width = w / v - 1 - math.log(w / v) if w else math.log(math.tau * v)              # q is a point
        terms.append(0.5 * (dims * width + off / v))
    return torch.stack(terms)


def fixed_small(grid: Grid) -> list[float]:
    """The variances of q(x_nxt | x_now, x0), exact where all data is one point; of the last step, those of the one
    before it, as it would be 0 (DDPM, section 3.2; the clip is that of its code).

    >>> [round(v, 4) for v in fixed_small(Grid([Level(1.0, 0.6, 0.8), Level(0.0, 0.8, 0.6)]))]
    [0.2461, 0.2461]
    """
    variances = [posterior(now, nxt)[2] for now, nxt in pairwise(grid)]
    return [*variances, variances[-1]]


def fixed_large(grid: Grid) -> list[float]:
    """The variances beta = 1 − (alpha_now/alpha_nxt)² of the forward steps, exact where data is N(0, I) (DDPM §3.2).

    >>> [round(v, 4) for v in fixed_large(Grid([Level(1.0, 0.6, 0.8), Level(0.0, 0.8, 0.6)]))]
    [0.4375, 0.36]
    """
    return [1 - (now.alpha / nxt.alpha) ** 2 for now, nxt in pairwise([*grid, Level(0.0, 1.0, 0.0)])]


def vae(image: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor, *, edges: float = 0.3,
        kl: float = 1e-4) -> Tensor:
    """L1 + 2·MSE + edges·(L1 of the finite differences) + kl·KL, every term a mean per element.

    KL(N(mean, var) ‖ N(0, 1)) = ½(mean² + var − 1 − log var) (Kingma & Welling, arXiv 1312.6114, appendix B).

    Args:
        image, decoded: (B,3,H,W) in [−1, 1]. mean, logvar: (B,C,H/f,W/f), the posterior.

    >>> x, m = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 1, 1)
    >>> vae(x, x, m, m).item()
    0.0
    """
    diff = decoded - image
    rows, cols = diff[..., 1:, :] - diff[..., :-1, :], diff[..., 1:] - diff[..., :-1]
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return (diff.abs().mean() + 2.0 * diff.square().mean()
            + edges * (rows.abs().mean() + cols.abs().mean()) + kl * divergence)


def perceptual(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """How far two pictures look apart to a net: |n(a) − n(b)|², averaged over places and layers.

    n gives the channels at every place unit length: LPIPS with equal weights (Zhang et al. 2018, arXiv 1801.03924,
    eq. 1).

    Args:
        maps, others: one (B,C,h,w) per layer, for each picture.

    >>> perceptual([torch.tensor([[[[3.0]], [[4.0]]]])], [torch.tensor([[[[-4.0]], [[3.0]]]])])   # at right angles
    tensor(2.0000)
    """
    unit = [[m / (m.square().sum(1, keepdim=True) + 1e-10).sqrt() for m in each] for each in (maps, others)]
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(*unit, strict=True)]).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss ½·mean max(0, 1 − real) + ½·mean max(0, 1 + fake) (Lim & Ye 2017, arXiv 1705.02894).

    Args:
        real, fake: its answers, of any shape, for true and for made pictures; what makes them is to lower −mean(fake).

    >>> hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, -1.0]))
    tensor(0.2500)
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The weight |∇ reconstruction| / |∇ adversarial| by the decoder's last layer: both pull on it alike (Esser et al.
    2021, arXiv 2012.09841, eq. 7), at most 10,000.

    Args:
        reconstruction, adversarial: scalars. last: the layer's weight, which both depend on.

    >>> w = torch.ones(2, requires_grad=True); adaptive_weight(3 * w.sum(), 2 * w.sum(), w)
    tensor(1.5000)
    """
    rec, adv = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial))
    return (rec / (adv + 1e-6)).clamp(max=1e4).detach()


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over all pairs of the batch (Radford et al. 2021, arXiv 2103.00020, fig. 3).

    Args:
        image, text: (N,P) unit vectors, row i of one belongs to row i of the other. logit_scale: log of the scale.

    >>> v = torch.eye(4); round(contrastive(v, v, torch.tensor(-1e9)).item(), 4)   # scale 0: ln 4
    1.3863
    """
    logits = logit_scale.exp() * image @ text.T  # (N, N)
    same = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """√(|a − b|² + c²) − c per row: |a − b|²/2c where it is small, |a − b| where it is large (iCT, arXiv 2310.14189).

    Args:
        a, b: (B,...); |·| is over all numbers of a row. c: about 0.00054·√D for D of them (section 3.3 of the paper).

    >>> pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 0.0), pseudo_huber(*torch.ones(2, 1, 2), 0.1)
    (tensor([5.]), tensor([0.]))
    """
    return ((a - b).flatten(1).square().sum(1) + c * c).sqrt() - c


def consistency(f: Callable, pred: Pred, now: Level, nxt: Level, *, goal: Callable | None = None,
                c: float = 0.0) -> Tensor:
    """How far f is from giving two neighbours on a path the same end, per row (Song et al. 2023, arXiv 2303.01469).

        pseudo_huber(f(x, now), goal(x', nxt)),   x = alpha·x0 + sigma·eps,   x' = alpha'·x0 + sigma'·eps

    Distillation and training differ in whom they ask for (x0, eps), and in nothing else. Distillation (algorithm 2): a
    teacher, at x; then x' is Euler's step, or Heun's if it answers with `chord`. Training (algorithm 3): the data, with
    the noise that was added.

    Args:
        f: (x, level) -> Pred, such as `prediction.consistent`. pred: x0 and eps (B,...), with x in them.
        now, nxt: neighbouring levels, in numbers or in tensors that broadcast; nxt is nearer to the data.
        goal: what f is to agree with, without gradient, such as an average of it; None: f (iCT, arXiv 2310.14189).
        c: of `pseudo_huber`; 0: the distance itself.

    Returns:
        (B,)

    Matches: zero for `exact.consistency`, above it for others, tests/test_losses.py.

    >>> ends = lambda x, level: Pred(torch.zeros_like(x), x)
    >>> consistency(ends, Pred(torch.zeros(1, 2), torch.ones(1, 2)), Level(2.0, 1.0, 2.0), Level(1.0, 1.0, 1.0))
    tensor([0.])
    """
    x, x1 = (level.alpha * pred.x0 + level.sigma * pred.eps for level in (now, nxt))
    with torch.no_grad():
        end = (goal or f)(x1, nxt).x0
    return pseudo_huber(f(x, now).x0, end, c)


def chord(denoise: Callable, x: Tensor, now: Level, nxt: Level) -> Pred:
    """The x0 and eps for which one step of Euler lands where Heun's would (arXiv 2206.00364, algorithm 1).

    Args:
        denoise: (x, level) -> Pred. now, nxt: levels of alpha = 1, in numbers or in tensors that broadcast.

    >>> chord(lambda x, level: Pred(0 * x, x / level.sigma), torch.tensor([4.0]), Level(2.0, 1.0, 2.0),
    ...       Level(1.0, 1.0, 1.0))
    Pred(x0=tensor([0.]), eps=tensor([2.]))
    """
    first = denoise(x, now)
    eps = (first.eps + denoise(first.x0 + nxt.sigma * first.eps, nxt).eps) / 2
    return Pred(x - now.sigma * eps, eps)


def reflow_pairs(denoise: Callable, z: Tensor, grid: Grid) -> Pred:
    """Noise and the data to which a flow carries it (Liu et al. 2022, arXiv 2209.03003): what reflow learns from.

    In `diffusion(net, "flow", …)` they take the place of data and noise that met by chance. The paths that come of it
    are straighter, and no longer than before.

    Args:
        denoise: (x, level) -> Pred. z: unit noise (B,...). grid: from it to the data; Euler's steps are taken.

    Returns:
        Pred(x0, eps): the ends, and z.

    >>> from minidiff.prediction import oracle
    >>> grid = Grid([Level(1000.0, 0.0, 1.0), Level(500.0, 0.5, 0.5), Level(0.0, 1.0, 0.0)])
    >>> reflow_pairs(oracle(3.0), torch.tensor([1.0]), grid)
    Pred(x0=tensor([3.]), eps=tensor([1.]))
    """
    with torch.no_grad():
        *_, last = euler(denoise, grid.start(z), grid)
    return Pred(last.x, z)


def lcm(net: Callable, teacher: Callable, kind: str, schedule: Callable, x0: Tensor, t: Tensor, eps: Tensor, *,
        skip: int = 20, scaling: float = 10.0, c: float = 1e-3) -> Tensor:
    """Latent consistency distillation per picture (Luo et al. 2023, arXiv 2310.04378, algorithm 1).

        mean of √(d² + c²) − c,   d = f(x_t, t) − f(x', t'),   x' = one step of DDIM from x_t to t' = max(t − skip, 0)
        f(x, t) = c_skip·x + c_out·x0(x, t),   c_skip = d²/(u² + d²),   c_out = u/√(u² + d²),   u = scaling·t,   d = ½

    The step is the teacher's; f(x', t') is the goal, without gradient. Both nets are told what they are told.
    NOTE: the goal is the net's own answer, not that of an average of it: Song & Dhariwal 2023 (arXiv 2310.14189,
    section 3.2) show that the average is not needed.

    Args:
        net: (x, t) -> out, the one that learns. teacher: the same, finished, with guidance in it (`guidance.cfg`).
        kind: what both predict: eps, x0 or v. schedule: t (B,) -> (alpha, sigma).
        x0, eps: clean data and unit noise (B,...). t: (B,) whole times, at the ends of steps: 19, 39 … 999.

    Returns:
        (B,)

    >>> from minidiff.schedule import SD
    >>> knows = lambda x, t: x / SD(t)[1].view(-1, 1)                        # the noise, where all data is 0
    >>> lcm(knows, knows, "eps", SD, torch.zeros(2, 1), torch.tensor([499, 999]), torch.ones(2, 1)).max() < 1e-6
    tensor(True)
    """
    def ends(x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        u = scaling * t.to(x).view(alpha.shape)
        x0 = split(kind, x, net(x, t).float(), alpha, sigma).x0
        return 0.25 / (u * u + 0.25) * x + u / (u * u + 0.25).sqrt() * x0

    nxt = (t - skip).clamp(min=0)
    now, then = ([part.to(x0).view(-1, *[1] * (x0.ndim - 1)) for part in schedule(time)] for time in (t, nxt))
    x = now[0] * x0 + now[1] * eps
    with torch.no_grad():
        guess = split(kind, x, teacher(x, t).float(), *now)
        goal = ends(then[0] * guess.x0 + then[1] * guess.eps, nxt, *then)
    return (((ends(x, t, *now) - goal).square() + c * c).sqrt() - c).flatten(1).mean(1)

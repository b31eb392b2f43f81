"""The training losses: noise prediction (DDPM), KL-VAE, contrastive (CLIP)."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.prediction import target
from minidiff.schedule import Discrete


def diffusion(net: Callable, kind: str, schedule: Discrete, x0: Tensor, t: Tensor, eps: Tensor, **cond) -> Tensor:
    """L_simple per picture: mean |net(alpha·x0 + sigma·eps, t) − target|² (DDPM, arXiv 2006.11239, eq. 14).

    Args:
        net: callable (x, t, **cond) -> out, raw prediction.
        kind: what the net predicts: eps, x0, v or flow.
        x0: clean data (B,...). eps: unit noise, the same shape. t: (B,) integer training times in 0…T−1.

    Returns:
        (B,) losses, one per picture.

    >>> from minidiff.schedule import SD
    >>> x0, eps, t = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0, 999])
    >>> diffusion(lambda x, t: torch.zeros_like(x), "eps", SD, x0, t, eps)   # predicts no noise: loss 1
    tensor([1., 1.])
    """
    alpha, sigma = (c.to(x0).view(-1, *[1] * (x0.ndim - 1)) for c in schedule(t))
    out = net(alpha * x0 + sigma * eps, t, **cond)
    return (out.float() - target(kind, x0, eps, alpha, sigma)).square().flatten(1).mean(1)


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

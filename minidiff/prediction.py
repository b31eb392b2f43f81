"""What a network predicts, and what that says about the picture and the noise: the one conversion."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from minidiff.schedule import Level

KINDS = ("eps", "x0", "v", "flow", "edm")
SIGMA_DATA = 0.5  # standard deviation of the data that EDM assumes (Karras et al., arXiv 2206.00364, table 1)


class Pred(NamedTuple):
    """A guess of the clean picture x0 and of the noise eps in x = alpha·x0 + sigma·eps, both shaped as x."""

    x0: Tensor
    eps: Tensor


def coefficients(kind: str, alpha: float | Tensor, sigma: float | Tensor, d: float = SIGMA_DATA) -> tuple:
    """The row (p, q) of a prediction type: its target is p·x0 + q·eps.

        eps (0, 1)     x0 (1, 0)     v (−sigma, alpha)     flow (−1, 1)     edm (sigma/d, −d·alpha)

    v: Salimans & Ho, arXiv 2202.00512; edm: the F of Karras et al., arXiv 2206.00364, eq. 8, at alpha²d² + sigma² = 1.

    Raises:
        ValueError: an unknown kind.

    >>> coefficients("v", 0.8, 0.6)
    (-0.6, 0.8)
    """
    if kind == "eps":
        return 0.0, 1.0
    if kind == "x0":
        return 1.0, 0.0
    if kind == "v":
        return -sigma, alpha
    if kind == "flow":
        return -1.0, 1.0
    if kind == "edm":
        return sigma / d, -d * alpha
    raise ValueError(f"unknown prediction kind {kind!r}; there are {', '.join(KINDS)}")


def target(kind: str, x0: Tensor, eps: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """What a net of this kind is trained to output: p·x0 + q·eps; alpha and sigma broadcast against x0.

    >>> import torch
    >>> target("flow", torch.tensor(1.0), torch.tensor(3.0), 0.5, 0.5)
    tensor(2.)
    """
    p, q = coefficients(kind, alpha, sigma)
    return p * x0 + q * eps


def split(kind: str, x: Tensor, out: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Pred:
    """Solve out = p·x0 + q·eps together with x = alpha·x0 + sigma·eps.

        x0 = (q·x − sigma·out)/det,   eps = (alpha·out − p·x)/det,   det = alpha·q − sigma·p

    Args:
        x, out: state and raw network output, the same shape. alpha, sigma: numbers, or tensors that broadcast.

    Raises:
        ValueError: the two equations do not determine x0 and eps (det = 0), as for eps at alpha = 0; of numbers only.

    >>> import torch
    >>> split("eps", torch.tensor(2.0), torch.tensor(1.0), 0.5, 1.0)
    Pred(x0=tensor(2.), eps=tensor(1.))
    """
    p, q = coefficients(kind, alpha, sigma)
    det = alpha * q - sigma * p
    if not isinstance(det, Tensor) and det == 0:
        raise ValueError(f"a {kind} prediction at alpha = {alpha:g}, sigma = {sigma:g} does not tell x0 and eps apart; "
                         "use v-prediction at zero terminal SNR, or start from a level above it")
    return Pred((q / det) * x - (sigma / det) * out, (alpha / det) * out - (p / det) * x)


def moved(kind: str, alpha: float | Tensor, sigma: float | Tensor, d: float = SIGMA_DATA) -> float | Tensor:
    """The k that moves (x, alpha, sigma) to the coordinates in which a net of this kind is trained.

        k = 1/√(alpha² + sigma²) for eps, x0, v;   1/(alpha + sigma) for flow;   1/√(alpha²d² + sigma²) for edm

    What other libraries call scale_model_input; of Karras et al. (arXiv 2206.00364, table 1) it is c_in.

    >>> moved("eps", 3.0, 4.0), moved("flow", 3.0, 1.0), moved("edm", 6.0, 4.0)
    (0.2, 0.25, 0.2)
    """
    if kind == "flow":
        return 1 / (alpha + sigma)
    return ((d * alpha if kind == "edm" else alpha) ** 2 + sigma**2) ** -0.5


def denoiser(net: Callable, kind: str) -> Callable[[Tensor, Level], Pred]:
    """Wrap a net (x, t) -> out as denoise(x, level) -> Pred, for a state in any coordinates.

    The state is first moved to those in which the net was trained, (x, alpha, sigma) ← k·(x, alpha, sigma) with the k
    of `moved`, as `train.losses.diffusion` did. x0 and eps do not change.

    >>> import torch
    >>> denoise = denoiser(lambda x, t: torch.zeros_like(x), "eps")      # sees no noise at all
    >>> denoise(torch.tensor([10.0]), Level(999.0, 1.0, 5.0)).x0
    tensor([10.])
    """
    coefficients(kind, 1.0, 1.0)

    def denoise(x: Tensor, level: Level) -> Pred:
        t, alpha, sigma = level
        k = moved(kind, alpha, sigma)
        if abs(k - 1) > 1e-6:
            x, alpha, sigma = k * x, k * alpha, k * sigma
        return split(kind, x, net(x, t), alpha, sigma)

    return denoise


def consistent(net: Callable, least: float, d: float = SIGMA_DATA) -> Callable[[Tensor, Level], Pred]:
    """The consistency function of a net (Song et al. 2023, arXiv 2303.01469, eq. 5): where the path through x ends.

        f = c_skip·y + c_out·net(c_in·y, t),   c_skip = d²/((u − least)² + d²),   c_out = d·(u − least)/√(u² + d²),
        c_in = 1/√(u² + d²),   y = x/alpha,   u = sigma/alpha

    At u = least f is y, whatever the net says: the boundary without which "always 0" would be consistent too.

    Args:
        net: (x, t) -> F. least: the noise-to-signal ratio at which paths end, sigma_min. d: deviation of the data.

    Returns:
        (x, level) -> Pred: x0 is f, eps what is then left of x. A level may hold tensors that broadcast against x.

    Matches: CMStochasticIterativeScheduler, tests/parity/test_samplers.py.

    >>> import torch
    >>> f = consistent(lambda x, t: torch.full_like(x, 100.0), least=0.002)
    >>> f(torch.tensor([3.0]), Level(0.0, 1.0, 0.002)).x0
    tensor([3.])
    """
    def end(x: Tensor, level: Level) -> Pred:
        t, alpha, sigma = level
        y, u = x / alpha, sigma / alpha
        scale = (u * u + d * d) ** -0.5
        x0 = d * d / ((u - least) ** 2 + d * d) * y + d * (u - least) * scale * net(scale * y, t)
        return Pred(x0, (x - alpha * x0) / sigma)

    return end


def score(pred: Pred, level: Level) -> Tensor:
    """∇ log p(x) of the noisy data by Tweedie's formula: −eps/sigma (Song et al. 2021, arXiv 2011.13456; Efron 2011).

    Args:
        pred: of an exact denoiser; of a trained one this is its estimate. level: sigma > 0.

    >>> import torch
    >>> score(Pred(torch.tensor(0.0), torch.tensor(1.0)), Level(0.0, 0.6, 0.8))
    tensor(-1.2500)
    """
    return -pred.eps / level.sigma


def oracle(x0: float | Tensor) -> Callable[[Tensor, Level], Pred]:
    """The denoiser that is right where all data is one point x0: what a sampler should bring anything to.

    >>> import torch
    >>> oracle(3.0)(torch.tensor(2.0), Level(0.0, 0.5, 0.5))
    Pred(x0=tensor(3.), eps=tensor(1.))
    """
    return lambda x, level: Pred(0 * x + x0, (x - level.alpha * x0) / level.sigma)

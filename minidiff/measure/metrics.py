"""How far two sets of pictures are from each other, on the features of any network: no download.

The numbers depend on the features: they are never to be compared with a published FID, which uses Inception's.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidiff.grid import Step


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets (Heusel et al., arXiv 1706.08500).

        |m_a − m_b|² + tr(S_a + S_b − 2·(S_a S_b)^½)

    It is 0 for equal means and covariances only, and too large by a bias of about 1/n for samples (arXiv 1801.01401).

    Args:
        a: (N,D), b: (M,D), features; more rows than columns, or the covariances are singular.

    Matches: two known Gaussians, tests/test_metrics.py.

    >>> a = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet(a, 3 + 2 * a), 6)                     # (3 − 0)² + (2 − 1)²·var, and var is 2
    11.0
    """
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()     # tr (S_a S_b)^½
    return ((a.mean(0) - b.mean(0)).square().sum() + left.trace() + right.trace() - 2 * cross).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³, unbiased (Bińkowski et al., arXiv 1801.01401).

    0 on average for two samples of one distribution, whatever their size; it can come out below 0.

    Args:
        a: (N,D), b: (M,D), features, at least two rows each.

    >>> kernel_distance(torch.zeros(2, 1), torch.ones(2, 1))      # 1 + 8 − 2·1
    7.0
    """
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision, the share of `made` inside the real data, and recall, of real inside what is made (arXiv 1904.06991).

    A set is the union of balls around its rows that reach to their k-th nearest neighbour.

    >>> real = torch.arange(8.0)[:, None]
    >>> precision_recall(real, torch.tensor([[2.0], [2.5], [30.0], [40.0]]), k=1)
    (0.5, 0.25)
    """
    def inside(x: Tensor, data: Tensor) -> float:
        radius = torch.cdist(data, data).kthvalue(k + 1).values                      # the nearest is the row itself
        return (torch.cdist(x, data) <= radius).any(1).double().mean().item()

    return inside(made, real), inside(real, made)


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a (N,...) the Euclidean distance to the nearest row of b (M,...), and which it is: (N,) each.

    Samples much nearer to the training data than fresh data are to it have been copied.

    >>> nearest(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), torch.tensor([[3.0, 4.0], [5.0, 5.0]]))[0]
    tensor([5., 0.])
    """
    return tuple(torch.cdist(a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1))


def straightness(steps: Sequence[Step]) -> Tensor:
    """How far paths are from straight: the mean of |velocity − mean velocity|² along each, (B,); 0 for a straight line.

    Liu et al. 2022 (arXiv 2209.03003, section 2.2), on the steps that were taken: the velocity of one is the change of
    x over that of sigma, and counts as long as the step.

    Args:
        steps: what a sampler yields on a flow's grid, such as that of `schedule.Flow`.

    >>> from minidiff.schedule import Level
    >>> ways = torch.tensor([[[0.0], [4.0]], [[2.0], [3.0]], [[4.0], [0.0]]])                # the second one turns
    >>> straightness([Step(Level(0.0, 1 - s, s), x, None) for s, x in zip((1.0, 0.5, 0.0), ways)])
    tensor([0., 4.])
    """
    x, sigma = torch.stack([step.x.flatten(1) for step in steps]), [step.level.sigma for step in steps]
    long = torch.tensor(sigma).to(x).diff()[:, None, None]
    off = x.diff(dim=0) / long - (x[-1] - x[0]) / (sigma[-1] - sigma[0])
    return (off.square().sum(2) * long[..., 0].abs()).sum(0) / abs(sigma[-1] - sigma[0])


def without_bias(measure: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor) -> float:
    """What a measure tends to for ever larger sets, if its bias falls as 1/n (Richardson 1911; arXiv 1911.07023).

    Half the sets have twice the bias, so 2·measure(whole) − mean of measure(half). It can come out below 0.

    >>> without_bias(lambda a, b: 5 + 1 / len(a), torch.zeros(8, 1), torch.zeros(8, 1))
    5.0
    """
    return 2 * measure(a, b) - (measure(a[::2], b[::2]) + measure(a[1::2], b[1::2])) / 2


def bootstrap(measure: Callable[..., float], *sets: Tensor, n: int = 200, seed: int = 0) -> tuple[float, float]:
    """Where the measure of other sets of the same size would lie, 95 %: n bootstrap samples (Efron 1979), centred.

    A sample with replacement has copies, and they shift `frechet`, `kernel_distance` and `precision_recall`. So the
    middle 95 % of the samples are moved by the difference of the measure and their mean; for a mean there is none.

    >>> low, high = bootstrap(lambda x: x.mean().item(), torch.arange(100.0)); low < 49.5 < high
    True
    """
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([measure(*(rows[torch.randint(len(rows), (len(rows),), generator=g)] for rows in sets))
                           for _ in range(n)], dtype=torch.float64)
    return tuple((values.quantile(torch.tensor([0.025, 0.975]).double()) - values.mean() + measure(*sets)).tolist())


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frechet": frechet,
    "frechet_without_bias": lambda real, made: without_bias(frechet, real, made),
    "kernel_distance": kernel_distance,
    "precision": lambda real, made: precision_recall(real, made)[0],
    "recall": lambda real, made: precision_recall(real, made)[1],
    "nearest": lambda real, made: nearest(made, real)[0].median().item(),
}


def compare(real: Tensor, made: Tensor, *, n: int = 100) -> dict[str, dict]:
    """All measures of `made` against `real`, each {"value", "low", "high", "n"} with its 95 % interval (`bootstrap`).

    They mean something beside the same comparison of two sets of real data, of the same size.

    Args:
        real, made: (N,D) features, at least 8 rows each.
        n: bootstrap samples for the intervals.

    >>> real, made = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    >>> {name: round(row["value"], 2) for name, row in compare(real, made, n=10).items() if name != "nearest"}
    {'frechet': 0.5, 'frechet_without_bias': 0.37, 'kernel_distance': 0.34, 'precision': 0.98, 'recall': 0.84}
    """
    rows = {}
    for name, measure in MEASURES.items():
        low, high = bootstrap(measure, real, made, n=n)
        if name in ("precision", "recall"):
            low, high = max(0.0, low), min(1.0, high)
        rows[name] = {"value": round(measure(real, made), 4), "low": round(low, 4), "high": round(high, 4),
                      "n": len(made)}
    return rows

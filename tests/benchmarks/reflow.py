"""Flows in the plane, trained on three kinds of pairs: by chance, of reflow, assigned within the batch; 16 seeds each.

    python tests/benchmarks/reflow.py          writes data/reflow.json

As in notebook 20: eight blobs on a ring, a small network, 2,000 steps with batches of 256, the rate falling to 0. For
each seed and number of Euler's steps: the share of 4,000 points within three widths of a blob, the mean bend of the
paths (`metrics.straightness`), and the energy distance to as many true points, against which a second set of true
points has `drawings`. Reflow learns from 20,000 pairs of the same seed's first flow, drawn in 32 steps.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import toys  # noqa: E402
from minidiff.grid import Grid  # noqa: E402
from minidiff.io.write import write_atomic  # noqa: E402
from minidiff.measure import metrics  # noqa: E402
from minidiff.nets.mlp import MLP, MLPConfig  # noqa: E402
from minidiff.prediction import denoiser  # noqa: E402
from minidiff.samplers import euler  # noqa: E402
from minidiff.schedule import Flow, Level  # noqa: E402
from minidiff.train import losses  # noqa: E402

OUT, RING, STEPS, N = ROOT / "data" / "reflow.json", toys.mixture("ring"), (1, 2, 4, 8, 64), 4000


def line(n: int) -> Grid:
    return Grid(Level(1000 * k / n, 1 - k / n, k / n) for k in range(n, -1, -1))


def by_chance(n: int) -> tuple[Tensor, Tensor]:
    return RING.means[torch.randint(8, (n,))] + RING.std * torch.randn(n, 2), torch.randn(n, 2)


def by_batch(n: int, size: int = 128) -> tuple[Tensor, Tensor]:
    """Within each `size` of them the assignment of least squared length."""
    x0, eps = by_chance(n)
    for part in (slice(first, first + size) for first in range(0, n, size)):
        far = torch.cdist(x0[part], eps[part]).square()
        eps[part] = eps[part][torch.from_numpy(linear_sum_assignment(far)[1])]
    return x0, eps


def trained(pairs, steps: int = 2000) -> nn.Module:
    net = MLP(MLPConfig(ch=96))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, eps = pairs(256)
        loss = losses.diffusion(net, "flow", Flow(), x0, 1000 * torch.rand(256), eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cooling.step()
    return net.requires_grad_(False)


def energy(a: Tensor, b: Tensor) -> float:
    """2·E|a − b| − E|a − a'| − E|b − b'|: 0 for equal distributions only (Székely & Rizzo 2013)."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


def measured(net: nn.Module, z: Tensor, true: Tensor) -> dict[str, dict[str, float]]:
    rows = {}
    for n in STEPS:
        *_, last = steps = list(euler(denoiser(net, "flow"), z, line(n)))
        near = torch.cdist(last.x, RING.means).amin(1) < 3 * RING.std
        rows[str(n)] = {"on": near.float().mean().item(), "bend": metrics.straightness(steps).mean().item(),
                        "energy": energy(last.x, true)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, drawings = {"chance": [], "reflow": [], "batch": []}, []
    for seed in tqdm(range(args.seeds)):
        torch.manual_seed(seed)
        z, (true, _), (other, _) = torch.randn(N, 2), by_chance(N), by_chance(N)
        first = trained(by_chance)
        pool = losses.reflow_pairs(denoiser(first, "flow"), torch.randn(20_000, 2), line(32))
        both = torch.stack(pool)
        second = trained(lambda n, both=both: both[:, torch.randint(both.shape[1], (n,))])
        for name, net in (("chance", first), ("reflow", second), ("batch", trained(by_batch))):
            runs[name].append(measured(net, z, true))
        drawings.append(energy(other, true))
    result = {"seeds": args.seeds, "points": N, "drawings": [round(value, 5) for value in drawings], "runs": {
        name: [{n: {what: round(value, 5) for what, value in row.items()} for n, row in run.items()} for run in each]
        for name, each in runs.items()}}
    write_atomic(args.out, json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

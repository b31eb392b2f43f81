"""The small U-Net of notebook 06 without its connections, trained ten times as long as there.

    python tests/benchmarks/cut_net.py --seeds 1 --threads 1

Stored for each seed is the loss on 500 drawings that the net was not trained on, at all noise levels, after 150 and
after 1,500 steps. A file that is there is continued.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import scenes  # noqa: E402
from minidiff.nets.unet import UNet, UNetConfig  # noqa: E402
from minidiff.schedule import SD  # noqa: E402
from minidiff.train import losses  # noqa: E402

TINY = UNetConfig(in_channels=3, out_channels=3, block_out_channels=(16, 24, 32), layers_per_block=1, heads=4,
                  down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=4,
                  cross_attention_dim=None)
BATCH, RATE, STOPS = 32, 2e-3, (150, 1500)


class Cut(UNet):
    """A U-Net whose kept maps are zero where the way up reads them."""

    def encode(self, x, emb, context):
        kept, x = super().encode(x, emb, context)
        return [0 * m for m in kept], x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "data/cut-net.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(args.out.read_text()) if args.out.is_file() else {}
    pictures, fresh = (scenes.render(n, 16, seed=seed, second=0.0)[0].float() / 127.5 - 1
                       for n, seed in ((2000, 5), (500, 77)))
    for seed in map(str, range(args.seeds)):
        if seed not in rows:
            rows[seed] = train(pictures, fresh, int(seed))
            print(seed, rows[seed], flush=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")


def train(pictures: Tensor, fresh: Tensor, seed: int) -> dict[str, float]:
    """{"150": loss on fresh drawings after 150 steps, …}; the rate falls evenly to zero at the last stop."""
    torch.manual_seed(seed)
    net, g, found = Cut(TINY), torch.Generator().manual_seed(seed + 1), {}
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    for step in range(STOPS[-1]):
        x0 = pictures[torch.randint(len(pictures), (BATCH,), generator=g)]
        t, eps = torch.randint(1000, (BATCH,), generator=g), torch.randn(x0.shape, generator=g)
        loss = losses.diffusion(net, "eps", SD, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STOPS[-1])
        optimizer.step()
        if step + 1 in STOPS:
            found[str(step + 1)] = on_fresh(net, fresh)
    return found


@torch.inference_mode()
def on_fresh(net: UNet, fresh: Tensor) -> float:
    t = torch.arange(len(fresh)) * 1000 // len(fresh)
    eps = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    return round(losses.diffusion(net, "eps", SD, fresh, t, eps).mean().item(), 4)


if __name__ == "__main__":
    main()

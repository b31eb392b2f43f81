"""What the guidance scale buys and costs on the 16×16 pixel models: right objects against diversity, both kinds.

    python tests/benchmarks/guidance.py -n 300 --out data/guidance.json --threads 1

classifier: the unconditional model (data/pixels) with the gradient of data/classifier; classifier-free: the model that
is told the class (data/pixels-class). Every point has the same n noises and classes, --steps steps of DDIM. The judge
is the reader, which neither kind ever saw: the share of pictures whose object it reads right, with a 95 % Wilson
interval, and `minidiff.measure.metrics.compare` on its features with n fresh drawings, with 95 % bootstrap intervals.
`drawings` are n other drawings in the place of samples, `limited` is classifier-free guidance in an interval only.
A file that is there is continued.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff import guidance  # noqa: E402
from minidiff.data import scenes  # noqa: E402
from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.measure import metrics  # noqa: E402
from minidiff.measure.evaluate import share  # noqa: E402
from minidiff.nets.classifier import Classifier  # noqa: E402
from minidiff.nets.reader import Reader  # noqa: E402
from minidiff.nets.unet import UNet  # noqa: E402
from minidiff.prediction import denoiser  # noqa: E402
from minidiff.samplers import ddim  # noqa: E402
from minidiff.sd.scheduler import preset  # noqa: E402

OBJECTS = scenes.ATTRIBUTES["object"]
SCALES, LIMITS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0), (0.3, 3.0)  # LIMITS: of sigma/alpha, for `limited`
LIMITED, BATCH = (3.0, 8.0), 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "data/guidance.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = weights_dir()
    plain, told = UNet.from_pretrained(weights / "pixels"), UNet.from_pretrained(weights / "pixels-class")
    classifier, reader = (kind.from_pretrained(weights / name) for kind, name in
                          ((Classifier, "classifier"), (Reader, "reader")))
    rows = json.loads(args.out.read_text()) if args.out.is_file() else {"n": args.n, "steps": args.steps,
                                                                      "limits": LIMITS}
    if (rows["n"], rows["steps"]) != (args.n, args.steps):
        parser.error(f"{args.out} has points of n = {rows['n']}, steps = {rows['steps']}; name another --out")
    real = drawings(args.n, seed=1)[0]

    def free(y: Tensor, scale: float) -> Callable:
        return denoiser(guidance.cfg(told, {"vec": y}, {"vec": torch.full_like(y, len(OBJECTS))}, scale), "eps")

    def limited(y: Tensor, scale: float) -> Callable:
        return guidance.interval(free(y, scale), denoiser(partial(told, vec=y), "eps"), *LIMITS)

    def by_classifier(y: Tensor, scale: float) -> Callable:
        return guidance.classifier_guidance(denoiser(plain, "eps"), classifier.log_prob(y), scale)

    def measure(kind: str, scale: str, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        if scale not in rows.setdefault(kind, {}):
            began = time.process_time()
            made, y = make()
            image = made.clamp(-1, 1)                                                     # as it would be shown
            row = {"accuracy": share((reader.read(image)["object"] == y).tolist()),
                   **metrics.compare(reader.features(real), reader.features(image)),
                   "outside": round((made.abs() > 1).float().mean().item(), 4)}    # share of the pixels clamped
            rows[kind][scale] = row
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            said = {name: row[name]["value"] for name in ("accuracy", "recall", "precision", "kernel_distance")}
            print(kind, scale, said, f"{time.process_time() - began:.0f} s", flush=True)

    measure("drawings", "", partial(drawings, args.n, seed=2))
    for scale in SCALES:
        measure("classifier-free", f"{scale:g}", partial(samples, free, scale, args))
        measure("classifier", f"{scale:g}", partial(samples, by_classifier, scale, args))
        if scale in LIMITED:
            measure("limited", f"{scale:g}", partial(samples, limited, scale, args))


def drawings(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n fresh drawings (n,3,16,16) in [−1, 1] with one object each, and which it is (n,)."""
    image, drawn = scenes.render(n, 16, seed=1000 + seed, second=0.0)
    return image.float() / 127.5 - 1, torch.tensor([OBJECTS.index(scene.object) for scene in drawn])


def samples(wrap: Callable, scale: float, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """n pictures (n,3,16,16) and the class asked for of each (n,); noise i is the same for every kind and scale."""
    y, out = torch.arange(args.n) % len(OBJECTS), []
    for first in range(0, args.n, BATCH):
        asked = y[first:first + BATCH]
        z = torch.randn(len(asked), 3, 16, 16, generator=torch.Generator().manual_seed(first))
        with torch.inference_mode():
            *_, last = ddim(wrap(asked, scale), z, preset("sd-ddpm", args.steps))
        out.append(last.x)
    return torch.cat(out), y


if __name__ == "__main__":
    main()

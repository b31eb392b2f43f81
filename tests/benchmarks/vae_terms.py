"""The loss of mini-sd's VAE with one term taken away at a time, at equal time: what each of them is good for.

    python -m minidiff train vae --size 64 --out runs/small
    python tests/benchmarks/vae_terms.py runs/small/vae --seconds 3600 --threads 1

Each variant grows from the given VAE of half the size for as many steps as it can take in `--seconds` of the
processor's time (found by its first 30), so that its learning rate has fallen to zero and the discriminator has had its
40 %. Then 400 drawings of never-seen pairs go through it and back, and through the grown VAE as it was before the first
step. Writes vae-terms.json and gallery/vae-terms.png into --out; rows that are there are kept.
"""
import argparse
import json
import random
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import scenes  # noqa: E402
from minidiff.io.images import save_image, to_pil, to_tensor, to_unit  # noqa: E402
from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.measure import evaluate, metrics  # noqa: E402
from minidiff.nets.patches import Patches  # noqa: E402
from minidiff.nets.reader import Reader  # noqa: E402
from minidiff.nets.vae import VAE  # noqa: E402
from minidiff.train import losses, pictures, recipes  # noqa: E402
from minidiff.train.recipes.begin import grown  # noqa: E402
from minidiff.train.trainer import Run  # noqa: E402


def nothing(*parts):
    return torch.zeros(())


def only_l1(image, decoded, mean, logvar):
    return (decoded - image).abs().mean()


PERCEPTUAL, ADVERSARIAL = ((patch.object(losses, name, nothing)) for name in ("perceptual", "adaptive_weight"))
VARIANTS = {
    "all terms": [],
    "no discriminator": [ADVERSARIAL],
    "no perceptual term": [PERCEPTUAL],
    "no KL": [patch.object(losses, "vae", partial(losses.vae, kl=0.0))],
    "neither discriminator nor perceptual term": [ADVERSARIAL, PERCEPTUAL],
    "L1 alone": [ADVERSARIAL, PERCEPTUAL, patch.object(losses, "vae", only_l1)],
}
SIZE, SHOWN = 128, 8
DRAWINGS = 24_000  # more than a variant sees in an hour of a core


def run(out: Path, drawings: Path, steps: int, **options) -> None:
    """The recipe, with drawings that are there already."""
    cache = out / "train" / drawings.name
    cache.parent.mkdir(parents=True, exist_ok=True)
    if not cache.is_symlink():
        cache.symlink_to(drawings.resolve())
    recipes.run("vae", out=out, size=SIZE, steps=steps, resume=any(out.glob("train/vae/step-*")), **options)


def trained(folder: Path, seconds: float, threads: int, init: Path) -> tuple[VAE, int]:
    """The VAE of one variant, and its steps."""
    plan, options = folder / "steps.json", {"threads": threads, "init": init}
    drawings = next(folder.parent.glob("train/pictures-*"))
    if not plan.is_file():
        times = []
        for steps in (5, 30):
            began = time.process_time()
            run(folder / f"first-{steps}", drawings, steps, **options)
            times.append(time.process_time() - began)
        plan.write_text(json.dumps(round(seconds / ((times[1] - times[0]) / 25))) + "\n")
    steps = json.loads(plan.read_text())
    run(folder, drawings, steps, **options)
    return VAE.from_pretrained(folder / "vae"), steps


@torch.inference_mode()
def measured(vae: VAE, n: int) -> tuple[dict, torch.Tensor]:
    """The row of the table, and the first pictures after their way through the VAE."""
    asked = evaluate.prompt_set("unseen", n)
    pipe = SimpleNamespace(vae=vae, size=SIZE, device="cpu")
    found = evaluate.round_trips(pipe, Reader.from_pretrained(weights_dir() / "reader"),
                                 Patches.from_pretrained(weights_dir() / "counter"), asked)
    image = to_tensor([scenes.draw(scene, SIZE, random.Random(f"ceiling {i}"))[0] for i, scene in enumerate(asked)])
    back = torch.cat([vae.decode(vae.encode(part)).clamp(-1, 1) for part in image.split(evaluate.BATCH)])
    psnr = 10 * torch.log10(4 / (back - image).square().mean((1, 2, 3)))
    low, high = metrics.bootstrap(lambda values: values.mean().item(), psnr)
    row = {"psnr": {"value": round(psnr.mean().item(), 2), "low": round(low, 2), "high": round(high, 2), "n": n},
           "sharpness": evaluate.ratio(found.energy, found.drawn),
           "pairs": evaluate.share([row["color"] and row["object"] for row in found.right])}
    return row, torch.cat([image[:SHOWN], back[:SHOWN]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("init", type=Path, help="folder of the VAE of half the size")
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/vae-terms"))
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("-n", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    file = args.out / "vae-terms.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    torch.set_num_threads(args.threads)
    pictures.DRAWINGS, strips = DRAWINGS, []
    pictures.dataset(Run(args.work, steps=1), SIZE, None)
    for number, (name, changes) in enumerate({"not trained": [], **VARIANTS}.items()):
        if name in VARIANTS:
            with ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change)
                vae, steps = trained(args.work / str(number), args.seconds, args.threads, args.init)
        else:
            vae, steps = grown(VAE.from_pretrained(args.init)), 0
        row, strip = measured(vae, args.n if name not in rows else SHOWN)
        rows.setdefault(name, {"steps": steps, "seconds": args.seconds if steps else 0, **row})
        strips += [*([] if strips else strip[:SHOWN]), *strip[SHOWN:]]
        file.write_text(json.dumps(rows, indent=1) + "\n")
    save_image(scenes.contact_sheet(to_pil(to_unit(torch.stack(strips))), SHOWN, gap=2), args.out / "gallery" /
               "vae-terms.png")
    for name, row in rows.items():
        print(f"| {name} | {row['psnr']['value']:.1f} dB | {row['sharpness']['value']:.2f} | "
              f"{100 * row['pairs']['value']:.1f} % |")


if __name__ == "__main__":
    main()

"""One change of the U-Net's recipe at a time, at equal steps: how well each result follows its prompts.

    python tests/benchmarks/ablations.py runs/mini-sd --steps 600 -n 200 --threads 1

The folder is a model with its cached latents (`train unet` has begun there); each variant trains its own U-Net in
FOLDER/ablations/NAME. Writes ablations.json into --out and prints a table; what is there already is not run again.
"""
import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.measure.evaluate import evaluate  # noqa: E402
from minidiff.train import losses, recipes  # noqa: E402
from minidiff.train.recipes import mini_sd  # noqa: E402

eps_loss = losses.diffusion


def v_loss(net, kind, schedule, x0, t, eps, **cond):
    """v-prediction (Salimans & Ho, arXiv 2202.00512)."""
    return eps_loss(net, "v", schedule, x0, t, eps, **cond)


def min_snr_loss(net, kind, schedule, x0, t, eps, **cond):
    """The eps loss weighted by min(SNR, 5)/SNR (Hang et al., arXiv 2303.09556)."""
    return eps_loss(net, kind, schedule, x0, t, eps, **cond) * losses.min_snr(kind, *schedule(t)).to(x0)


VARIANTS = {
    "as shipped": [],
    "v-prediction": [patch.object(losses, "diffusion", v_loss),
                     patch.dict(mini_sd.SCHEDULER, prediction_type="v_prediction")],
    "min-SNR weights, 5": [patch.object(losses, "diffusion", min_snr_loss)],
}
KEPT = {"all seven right": "picture_accuracy", "never-seen pairs": "unseen_pair_accuracy",
        "two objects": "binding_accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    file = args.out / "ablations.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    for number, (name, patches) in enumerate(VARIANTS.items()):
        if name in rows:
            continue
        out = args.folder / "ablations" / str(number)
        (out / "train").mkdir(parents=True, exist_ok=True)
        parts = ["vae", "tokenizer", "text_encoder"]
        for part in parts + [f"train/{path.name}" for path in (args.folder / "train").glob("latents-*")]:
            if not (out / part).exists():
                (out / part).symlink_to((args.folder / part).resolve())
        for change in patches:
            change.start()
        recipes.run("unet", out=out, steps=args.steps, threads=args.threads, resume=(out / "train" / "unet").exists())
        for change in patches:
            change.stop()
        result = evaluate(out, n=args.n, progress=True)
        rows[name] = {"steps": args.steps, "n": args.n, "attribute_accuracy": result["attribute_accuracy"],
                      **{label: result[key] for label, key in KEPT.items()}}
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for name, row in rows.items():
        print(f"| {name} | {100 * row['attribute_accuracy']:.1f} % | "
              + " | ".join(f"{100 * row[label]['value']:.1f} %" for label in KEPT) + " |")


if __name__ == "__main__":
    main()

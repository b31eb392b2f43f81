"""How mini-sd's accuracy depends on guidance, steps and training: numbers (JSON) and one figure.

    python tests/benchmarks/adherence.py MODEL --out data -n 200 --snapshots FOLDER --threads 1

FOLDER holds averaged nets from the course of a run, `ema.safetensors` of its checkpoints, each file named by its step:
1500.safetensors.
Each point is `minidiff.measure.evaluate.evaluate` with n prompts per set; the bars are 95 % Wilson intervals. Writes
adherence.json and gallery/adherence.png into --out, and gallery/guidance.png, the same prompts and seeds at different
scales.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import scenes  # noqa: E402
from minidiff.io.weights import load_state  # noqa: E402
from minidiff.measure.evaluate import evaluate, prompt_set  # noqa: E402
from minidiff.sd.pipeline import StableDiffusion  # noqa: E402
from minidiff.teach.show import png, style  # noqa: E402

SCALES, STEPS = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0), (4, 8, 15, 25, 50)
KEPT = {"all seven right": "picture_accuracy", "never-seen pairs": "unseen_pair_accuracy",
        "two objects": "binding_accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument("--snapshots", type=Path)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = StableDiffusion.from_pretrained(args.model)
    file = args.out / "adherence.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}

    def measure(axis: str, value: float, **settings) -> None:
        row = rows.setdefault(axis, {})
        if str(value) not in row:
            result = evaluate(pipe, n=args.n, **settings)
            row[str(value)] = {"attribute_accuracy": result["attribute_accuracy"], "n": args.n,
                               **{name: result[key] for name, key in KEPT.items()}}
            print(axis, value, {name: row[str(value)][name]["value"] for name in KEPT}, flush=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")

    nets = nn.ModuleDict({"unet": pipe.unet, "text": pipe.text.encoders[0]})
    final = {name: value.clone() for name, value in nets.state_dict().items()}
    snapshots = args.snapshots.glob("*.safetensors") if args.snapshots else ()
    for snapshot in sorted(snapshots, key=lambda path: int(path.stem)):
        nets.load_state_dict(load_state(snapshot))
        measure("training", int(snapshot.stem))
    nets.load_state_dict(final)
    for scale in SCALES:
        measure("guidance", scale, guidance_scale=scale)
    for steps in STEPS:
        measure("steps", steps, steps=steps)
    (args.out / "gallery/adherence.png").write_bytes(png(figure(rows)))
    prompts = [scenes.caption(scene) for name in ("seen", "unseen", "two") for scene in prompt_set(name, 4)]
    pictures = [image for scale in (1.0, 2.0, 4.0, 7.5, 10.0) for image in pipe(prompts, guidance_scale=scale)]
    scenes.contact_sheet(pictures, len(prompts)).save(args.out / "gallery/guidance.png", optimize=True)


def figure(rows: dict):
    import matplotlib.pyplot as plt

    style()
    labels = {"training": "U-Net training steps", "guidance": "guidance scale", "steps": "sampling steps (DDIM)"}
    fig, axes = plt.subplots(1, len(rows), figsize=(3.6 * len(rows), 3.2), sharey=True)
    for ax, (axis, label) in zip(axes, [(axis, label) for axis, label in labels.items() if axis in rows]):
        for marker, name in zip("o^s", KEPT):
            x = sorted(map(float, rows[axis]))
            shares = [rows[axis][str(int(v)) if str(v) not in rows[axis] else str(v)][name] for v in x]
            y = [share["value"] for share in shares]
            ax.errorbar(x, y, [[share["value"] - share["low"] for share in shares],
                               [share["high"] - share["value"] for share in shares]],
                        marker=marker, markersize=4, capsize=2, label=name)
        ax.set(xlabel=label, ylim=(0, 1.02))
    axes[0].set_ylabel("share of pictures")
    axes[0].legend(fontsize=8, loc="lower right")
    return fig


if __name__ == "__main__":
    main()

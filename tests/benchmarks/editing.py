"""What moved attention keeps, words and layout apart, and what mini-sd draws from averaged noises.

    python tests/benchmarks/editing.py --out data/editing.json --threads 1

The edits are those of notebook 16: a drawn scene's colour is exchanged in "a red house", both prompts start from one
noise, 8 steps. `words` moves the cross-attention of 80 % of the steps, `layout` the self-attention of 40 %. Of every
way the share of edits in which the reader finds an attribute of the first picture again (for the colour: the one asked
for), with 95 % Wilson intervals. Then "a red house" from averages of 16 noises, as they are and rescaled to unit noise,
and from unit noises: how often each value of time, size and sky is read.
"""
import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff import StableDiffusion, editing  # noqa: E402
from minidiff.data import scenes  # noqa: E402
from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.measure.evaluate import share  # noqa: E402
from minidiff.nets.attention import watched  # noqa: E402
from minidiff.nets.reader import Reader  # noqa: E402

WAYS = {"plain": (0.0, 0.0), "words": (0.8, 0.0), "layout": (0.0, 0.4), "both": (0.8, 0.4)}  # of the steps
STEPS, BATCH, AVERAGED = 8, 10, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=100, help="edits")
    parser.add_argument("--sets", type=int, default=24, help="sets of noises")
    parser.add_argument("--out", type=Path, default=ROOT / "data/editing.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    reader = Reader.from_pretrained(weights_dir() / "reader")
    rows = {"n": args.n, "steps": STEPS, "edits": edits(pipe, reader, args.n)}
    rows["averaged noises"] = {"sets": args.sets, **averages(pipe, reader, args.sets)}
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


def edits(pipe: StableDiffusion, reader: Reader, n: int) -> dict:
    pairs = [recoloured(i) for i in range(n)]
    prompts = [tuple(map(short, pair)) for pair in pairs]
    z, asked = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(
        [scenes.labels(after)["color"] for _, after in pairs])
    rows = {}
    for way, (words, layout) in WAYS.items():
        parts = []
        for i in range(0, n, BATCH):
            places = torch.stack([editing.aligned(pipe.text.tokenizers[0], *pair) for pair in prompts[i:i + BATCH]])
            with watched(pipe.unet, editing.prompt_to_prompt(places, STEPS, words=words, layout=layout)):
                parts.append(pipe([text for text in map(list, zip(*prompts[i:i + BATCH])) for text in text],
                                  latents=z[i:i + BATCH].repeat(2, 1, 1, 1), steps=STEPS, output="tensor").chunk(2))
        before, after = (reader.read(torch.cat(part) * 2 - 1) for part in zip(*parts))
        rows[way] = {name: share((after[name] == (asked if name == "color" else before[name])).tolist())
                     for name in before}
        print(way, {name: row["value"] for name, row in rows[way].items()}, flush=True)
    return rows


def averages(pipe: StableDiffusion, reader: Reader, sets: int) -> dict:
    many = torch.randn(sets, AVERAGED, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    mean, rows = many.mean(1), {}
    for way, z in {"as it is": mean, "rescaled": mean / mean.std((1, 2, 3), keepdim=True), "unit": many[:, 0]}.items():
        found = reader.read(pipe(["a red house"] * sets, latents=z, steps=STEPS, output="tensor") * 2 - 1)
        rows[way] = {name: dict(Counter(scenes.ATTRIBUTES[name][k] for k in found[name].tolist()).most_common())
                     for name in ("time", "size", "sky")}
        print(way, rows[way], flush=True)
    return rows


def recoloured(i: int) -> tuple[scenes.Scene, scenes.Scene]:
    """A scene, and the same one in another colour; no pair that training left out."""
    rng = random.Random(f"edit {i}")
    scene = scenes.sample(rng, second=0.0)
    others = [color for color in scenes.ATTRIBUTES["color"]
              if color != scene.color and (color, scene.object) not in scenes.HELD_OUT]
    return scene, scene._replace(color=rng.choice(others))


def short(scene: scenes.Scene) -> str:
    return f"{'an' if scene.color[0] == 'o' else 'a'} {scene.color} {scene.object}"


if __name__ == "__main__":
    main()

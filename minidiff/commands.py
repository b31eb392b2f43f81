"""What the command line does beside `generate`. Heavy modules are loaded when needed."""
from __future__ import annotations

import json
from pathlib import Path


def train(recipe: str, *, out: str | Path | None = None, steps: int | None = None, seconds: float | None = None,
          size: int | None = None, device: str | None = None, threads: int | None = None,
          data: str | Path | None = None, init: str | Path | None = None, resume: bool = False,
          batch: int | None = None, accumulate: int | None = None, **own: int | str | bool | None) -> Path:
    """Train one of the networks of mini-sd; returns the folder with its weights, log and sample pictures.

    Args:
        recipe: a name that `train --list` shows.
        out … own: see `minidiff.train.recipes.run`, also for errors; None takes the recipe's own value.
    """
    from minidiff.train import recipes

    options = {"out": out, "steps": steps, "seconds": seconds, "size": size, "device": device, "threads": threads,
               "data": data, "init": init, "batch": batch, "accumulate": accumulate, **own}
    return recipes.run(recipe, resume=resume, **{name: value for name, value in options.items() if value is not None})


def recipes() -> dict[str, str]:
    """Name and first line of the description of every training recipe."""
    from minidiff.train.recipes import RECIPES

    return {name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in RECIPES.items()}


def evaluate(model: str | Path = "mini-sd", *, n: int = 1000, json_file: str | Path | None = None,
             out: str | Path | None = None, overwrite: bool = False, **settings) -> tuple[dict, Path]:
    """Measure how well a model's pictures show what their prompts say: see `minidiff.measure.evaluate.evaluate`.

    Returns:
        The numbers, and the file of the contact sheet: `out`, or the next free minidiff-0001.png.
    """
    from minidiff.io.images import check_writable, image_format
    from minidiff.io.write import claimed, targets
    from minidiff.measure.evaluate import evaluate as measure

    sheet, = targets(out, 1)
    image_format(sheet)
    check_writable([sheet, *([Path(json_file)] if json_file else [])], overwrite)
    with claimed([sheet], out is None) as (sheet,):
        return measure(model, n=n, json_path=json_file, sheet_path=sheet, progress=True, **settings), sheet


def info(path: str | Path) -> dict:
    """What a model file or folder holds, see `minidiff.io.info.describe`; or how a picture was made.

    Returns:
        Of a picture {"path", "picture" (size and format), "text", "settings"}, the last two None where it does not say:
        see `minidiff.io.parameters.read`.
    """
    from minidiff.io.images import picture_size
    from minidiff.io.info import describe
    from minidiff.io.parameters import read

    if (size := picture_size(path)) is None:
        return describe(path)
    return {"path": str(path), "picture": size, **(read(path) or {"text": None, "settings": None})}


def bench(model: str | Path = "mini-sd", *, threads: int | None = None, json_file: str | Path | None = None,
          overwrite: bool = False, **options) -> dict:
    """How fast a model runs: `minidiff.measure.bench`.

    Args:
        threads: of the CPU. json_file: also write the result there. overwrite: whether that file may be replaced.

    Raises:
        ValueError, OSError: threads < 1, what `measure.bench` raises, or a file that cannot be written.
    """
    import torch

    from minidiff.io.images import check_writable
    from minidiff.io.write import write_atomic
    from minidiff.measure.bench import bench as measure
    from minidiff.values import whole

    if threads is not None:
        torch.set_num_threads(whole("threads", threads, 1, 4096))
    if json_file is not None:
        check_writable([Path(json_file)], overwrite)
    result = measure(model, **options)
    if json_file is not None:
        write_atomic(json_file, json.dumps(result, indent=2) + "\n")
    return result


def grade(folder: str | Path, *, csv_file: str | Path | None = None, seconds: float = 300.0,
          overwrite: bool = False) -> str:
    """Run a folder of handed-in notebooks and count their exercises: `minidiff.teach.grade`.

    Args:
        csv_file: also write the marks there, for a spreadsheet. seconds: stop a cell that takes longer.
        overwrite: whether that file may be replaced.

    Returns:
        A table: a line for each hand-in.

    Raises:
        ValueError, OSError: see `minidiff.teach.grade.grade`, or a file that cannot be written.
    """
    from tqdm import tqdm

    from minidiff.io.images import check_writable
    from minidiff.io.write import write_atomic
    from minidiff.teach.grade import as_csv, hand_ins, table
    from minidiff.teach.grade import grade as run

    if csv_file is not None:
        check_writable([Path(csv_file)], overwrite)
    n = len(hand_ins(folder))
    rows = list(tqdm(run(folder, seconds), "grading", n, unit=" hand-ins", delay=1.0, leave=False))
    if csv_file is not None:
        write_atomic(csv_file, as_csv(rows))
    return table(rows)


def web(kind: str, folder: str | Path, *, source: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write the notebooks as "pages" or as "slides", with a progress bar: `minidiff.teach.web`.

    Args:
        folder, source, overwrite: see there, also for errors.

    Returns:
        The page that links to all.
    """
    from tqdm import tqdm

    from minidiff.teach import web

    n = len(web.books(source))
    for _ in tqdm(getattr(web, kind)(folder, source, overwrite=overwrite), kind, n, delay=1.0, leave=False):
        pass
    return Path(folder) / web.INDEX

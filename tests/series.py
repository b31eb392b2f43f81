"""The notebook series: `python tests/series.py check|execute|solutions [notebooks/01*.ipynb …]`; rules: rules.py."""
from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import statistics
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a command
    sys.path[0] = str(ROOT)

from minidiff.teach.lab import without_widgets  # noqa: E402
from tests.rules import each, equations, lint, minutes, name_of, parse, read, size, tracks  # noqa: E402

FOLDER = ROOT / "notebooks"
WARN, LIMIT = 90, 180  # seconds of CPU time of a notebook; notebooks/conftest.py has the same
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PROBE = """import json as _json, psutil as _psutil, resource as _resource, sys as _sys
_peak = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss * (1 if _sys.platform == "darwin" else 1024)
print(_json.dumps([sum(_psutil.Process().cpu_times()[:4]), _peak / 1e9]))"""  # user, system, and those of children


def definitions(path: Path) -> dict[str, str]:
    """{"samplers.ddim": source of the cell tagged `mirrors:samplers.ddim`}"""
    return {name_of(cell, "mirrors:"): cell.source for _, cell in each(read(path), "code", "mirrors:")}


def load(path: Path, name: str) -> object:
    """What a mirrors cell defines, made from it, mirrors and part cells before it and the notebook's imports alone."""
    space, found = {"__name__": "scratch"}, definitions(path)
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for _, cell in each(read(path), "code"):
        mirrors = cell.source in found.values() or "part" in cell.metadata.get("tags", [])
        body = [node for node in parse(cell.source).body if isinstance(node, kept if mirrors else kept[:2])
                or mirrors and isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        exec(compile(ast.Module(body, []), path.name, "exec"), space)
        if cell.source == found[name]:
            return space[name.rpartition(".")[2]]
    raise KeyError(name)


def execute(path: Path) -> float:
    """Run a notebook top to bottom as the tests do, write what it took into its banner, and store it. CPU seconds."""
    from nbclient import NotebookClient

    nb = read(path)
    nb.cells.append(new_code_cell(PROBE))
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(folders)}
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | fixed
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                   record_timing=False, store_widget_state=False, coalesce_streams=True).execute(env=environment)
    seconds, peak = json.loads(nb.cells.pop().outputs[0].text)
    for _, cell in each(nb, "markdown", "banner"):
        sentence = f"Runs in about {seconds:.0f} s of CPU time and {peak:.1f} GB of memory, offline, without a GPU."
        main, deeper = map(minutes, tracks(nb))
        sentence += f" Reading takes about {main} minutes" + (f", and {deeper} more for Deeper." if deeper else ".")
        cell.source = f"{sentence} {cell.metadata.get('needs', nb.metadata.get('needs', ''))}".strip()
    write(tidy(nb), path)
    return seconds


def tidy(nb) -> nbformat.NotebookNode:
    """Without what changes from run to run and from machine to machine."""
    nb.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}} | {
        key: value for key, value in nb.metadata.items() if key not in ("kernelspec", "language_info")}
    for _, cell in each(nb, ""):
        cell.metadata.pop("execution", None)
    without_widgets({"type": "notebook", "content": nb})
    return nb


def write(nb, path: Path) -> None:
    """The whole file appears at once, or the old one stays."""
    nbformat.validate(nb)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def bank(number: str):
    """The module minidiff/teach/bank/NN.py."""
    return importlib.import_module(f"minidiff.teach.bank.{number}")


def banks() -> list[str]:
    return sorted(path.stem for path in (ROOT / "minidiff" / "teach" / "bank").glob("[0-9][0-9].py"))


def solutions(number: str) -> nbformat.NotebookNode:
    """The solutions notebook of a bank: its imports, then each exercise's title, solution and check."""
    module, title = bank(number), f"# Solutions of notebook {number}\nTry first: `check` says what is missing."
    imports = [ast.unparse(node) for node in parse(inspect.getsource(module)).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    sources = "".join(inspect.getsource(exercise.solution) for exercise in module.EXERCISES.values())
    imports = [line for line in imports if re.search(rf"\b{line.split()[-1]}\b", sources)]
    groups = [[line for line in imports if (line.split()[1] in sys.stdlib_module_names) == standard]
              for standard in (True, False)] + [["from minidiff.teach import check"]]
    imports = [line for group in groups if group for line in (*group, "")][:-1]
    cells = [new_markdown_cell(title), new_code_cell("\n".join(imports))]
    for name, exercise in module.EXERCISES.items():
        stars, f = "★" * exercise.difficulty, exercise.solution
        cells += [new_markdown_cell(f"## {name} {exercise.title}\n{stars} · {exercise.minutes} min"),
                  new_code_cell(f'{inspect.getsource(f)}\n\ncheck("{name}", {f.__name__})')]
    for place, cell in enumerate(cells):
        cell.id = f"solution-{place}"
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})


def summary(path: Path) -> str:
    """What is printed and not enforced: length, words, proofs and size."""
    nb, code = read(path), [cell.source for _, cell in each(read(path), "code")]
    proofs = sum(bool(re.search(r"\bassert", source)) for source in code)
    lengths = "; ".join(f"{name} " + ", ".join(f"{n} {what}" for what, n in size(cells).items())
                        for name, cells in zip(("main line", "Deeper"), tracks(nb)) if cells)
    median, megabytes = statistics.median([len(each.splitlines()) for each in code] or [0]), path.stat().st_size / 1e6
    return (f"{path.name}: {lengths}; median cell {median:g} lines, {len(set(equations(path)[0]))} equations, "
            f"{proofs} cells with an assert, {megabytes:.2f} MB"
            + (" (warning: the aim is 0.8)" if megabytes > 0.8 else ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/series.py", description=__doc__)
    parser.add_argument("action", choices=("check", "execute", "solutions"))
    parser.add_argument("files", nargs="*", type=Path, help="default: all notebooks")
    chosen = parser.parse_args(arguments)
    files, failed = chosen.files or sorted(FOLDER.glob("*.ipynb")), False
    if chosen.action == "solutions":
        (FOLDER / "solutions").mkdir(parents=True, exist_ok=True)
        for number in banks():
            write(solutions(number), FOLDER / "solutions" / f"{number}.ipynb")
        return 0
    for path in files:
        if chosen.action == "execute":
            seconds = execute(path)
            over = f": over {LIMIT} s" if seconds >= LIMIT else f": warning, over {WARN} s" if seconds >= WARN else ""
            print(f"{path.name}: {seconds:.1f} s of CPU time{over}")
            failed |= seconds >= LIMIT
        else:
            sentences = lint(path)
            print(*sentences, summary(path), sep="\n")
            failed |= bool(sentences)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

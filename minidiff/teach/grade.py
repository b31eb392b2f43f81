"""Grading a folder of handed-in notebooks: each is run by itself, whatever it does, and its exercises are counted."""
from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minidiff.teach.check import NOT_TRIED, RIGHT, WRONG, exercises
from minidiff.values import number

# of a check, or of its report, in colour or not
LINE = re.compile(rf"^(?:\x1b\[[\d;]+m)?([{NOT_TRIED}{RIGHT}{WRONG}])(?:\x1b\[0m)? (\d\d\.\d+) ", re.MULTILINE)
LAST = "from minidiff.teach import check; check.report()"


class HandIn(NamedTuple):
    """What became of one notebook.

    file: its name in the folder. marks: exercise -> ○, ✓ or ✗. remark: how far it came, if not to its end.
    """

    file: str
    marks: dict[str, str]
    remark: str

    def count(self, mark: str) -> int:
        """How many exercises have a mark."""
        return [*self.marks.values()].count(mark)


def grade(folder: str | Path, seconds: float = 300.0) -> Iterator[HandIn]:
    """Run every notebook of a folder, and of those inside it, and read its marks.

    It runs the code of others: do it where that may be done.

    Each has a process of its own: one that ends its kernel, was cut short or never ends costs nobody else anything, and
    keeps the marks that it had until then.

    Args:
        seconds: after so many in one cell a notebook is stopped.

    Raises:
        FileNotFoundError: there is no such folder, or no notebook in it. ValueError: seconds is not positive.
    """
    folder, files = Path(folder), hand_ins(folder)
    if number("seconds", seconds) <= 0:
        raise ValueError(f"seconds is {seconds:g}; it must be positive")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as several:      # each of them waits for a process
        for file, row in zip(files, several.map(partial(_alone, seconds=seconds), files)):
            yield row._replace(file=file.relative_to(folder).as_posix())


def hand_ins(folder: str | Path) -> list[Path]:
    """The notebooks in a folder and in those inside it.

    Raises:
        FileNotFoundError: there is no such folder, or no notebook in it.
    """
    files = [file for file in sorted(Path(folder).rglob("*.ipynb")) if ".ipynb_checkpoints" not in file.parts]
    if not files:
        raise FileNotFoundError(f"there is no {'notebook in' if Path(folder).is_dir() else 'folder'} {folder}")
    return files


def table(hand_ins: list[HandIn]) -> str:
    """A line for each hand-in and one for all.

    >>> print(table([HandIn("ada.ipynb", {"01.1": "✓", "01.2": "○"}, ""), HandIn("bo.ipynb", {}, "is no notebook")]))
    hand-in    ✓  ✗  ○
    ada.ipynb  1  0  1
    bo.ipynb   0  0  0  is no notebook
    2 hand-ins, 1 exercise right
    """
    wide = max(len(row.file) for row in hand_ins)
    lines = [f"{'hand-in':{wide}}  {RIGHT}  {WRONG}  {NOT_TRIED}"]
    for row in hand_ins:
        counts = "  ".join(str(row.count(mark)) for mark in (RIGHT, WRONG, NOT_TRIED))
        lines.append(f"{row.file:{wide}}  {counts}  {row.remark}".rstrip())
    right = sum(row.count(RIGHT) for row in hand_ins)
    several = "" if len(hand_ins) == 1 else "s"
    return "\n".join([*lines, f"{len(hand_ins)} hand-in{several}, {right} exercise{'' if right == 1 else 's'} right"])


def as_csv(hand_ins: list[HandIn]) -> str:
    """The marks as a table for a spreadsheet: a row for each hand-in, a column for each exercise.

    >>> print(as_csv([HandIn("ada.ipynb", {"01.1": "✓"}, "")]).replace(chr(13), ""))
    hand-in,right,wrong,not attempted,01.1,remark
    ada.ipynb,1,0,0,✓,
    <BLANKLINE>
    """
    names = sorted({name for row in hand_ins for name in row.marks})
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["hand-in", "right", "wrong", "not attempted", *names, "remark"])
    for row in hand_ins:
        writer.writerow([row.file, *(row.count(mark) for mark in (RIGHT, WRONG, NOT_TRIED)),
                         *(row.marks.get(name, "") for name in names), row.remark])
    return file.getvalue()


def _alone(file: Path, seconds: float) -> HandIn:
    """One notebook, run by another process."""
    command = [sys.executable, "-m", "minidiff.teach.grade", str(file), str(seconds)]
    try:
        # a kernel that does not listen to its interrupt ends with its parent
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=20 * seconds + 60,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        marks, remark = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        marks, remark = {}, "took too long and did not stop"
    except (ValueError, IndexError):
        marks, remark = {}, f"could not be run: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return HandIn(file.name, marks, remark)


def _run(file: Path, seconds: float) -> tuple[dict[str, str], str]:
    """Marks and remark of one notebook, here."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        book = nbformat.read(file, 4)
        nbformat.validate(book)
    except Exception as error:                                           # whatever is in a file of this name
        return {}, f"is no notebook: {' '.join(str(error).split())[:100]}"
    book.cells.append(nbformat.v4.new_code_cell(LAST))
    remark, over = "", []
    try:
        NotebookClient(book, timeout=seconds, allow_errors=True, kernel_name="python3",
                       on_cell_executed=lambda **what: over.append(what),
                       resources={"metadata": {"path": str(file.parent)}}).execute()
    except CellTimeoutError:
        remark = f"was stopped after {seconds:g} s in a cell"
    except DeadKernelError:
        remark = "ended its kernel"
    except Exception as error:                                           # of the kernel, whatever happened to it
        remark = f"could not be run on: {' '.join(str(error).split())[:100]}"
    if remark:
        remark += f", {len(over)} cells had run"
    marks = {}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            marks |= {name: mark for mark, name in LINE.findall(str(output.get("text", "")))}
    if marks:                                                            # those that were never reached
        notebook = min(marks).partition(".")[0]
        marks = dict.fromkeys(exercises(notebook), NOT_TRIED) | marks
    return marks, remark


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(json.dumps(_run(Path(sys.argv[1]), float(sys.argv[2]))))

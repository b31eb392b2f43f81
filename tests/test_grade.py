"""Grading: right and wrong answers are counted, and no hand-in, whatever it does, costs another one anything."""
import csv

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from minidiff import cli
from minidiff.teach.grade import grade, hand_ins

IMPORT = "import torch\nfrom minidiff.teach import check"
RIGHT = "check('01.1', lambda betas: torch.cumprod(1 - betas, 0))"
WRONG = "check('01.1', lambda betas: betas.cumprod(0))"
HAND_INS = {  # name -> its cells, marks of 01.1, and what is said of it
    "right": ([IMPORT, RIGHT], "✓", ""), "wrong": ([IMPORT, WRONG], "✗", ""),
    "mended": ([IMPORT, WRONG, RIGHT], "✓", ""), "open": ([IMPORT, "check('01.1', ...)"], "○", ""),
    "error": ([IMPORT, "1 / 0", RIGHT], "✓", ""), "nothing": (["x = 1"], None, ""),
    "exits": ([IMPORT, RIGHT, "import os; os._exit(3)"], "✓", "ended its kernel, 2 cells had run"),
    "loops": ([IMPORT, RIGHT, "while True: pass"], "✓", "was stopped after 20 s in a cell"),
    "stubborn": ([IMPORT, WRONG, "while True:\n    try:\n        while True: pass\n    except BaseException: pass"],
                 "✗", "was stopped after 20 s in a cell"),
    "cut": (None, None, "is no notebook")}


@pytest.fixture
def folder(tmp_path):
    for name, (cells, _, _) in HAND_INS.items():
        book = new_notebook(cells=[new_code_cell(cell) for cell in cells or [IMPORT, RIGHT]])
        text = nbformat.writes(book)
        (tmp_path / f"{name}.ipynb").write_text(text if cells else text[:len(text) // 2], encoding="utf-8")
    return tmp_path


@pytest.mark.timeout(280)
def test_ten_hand_ins_four_of_them_hostile(folder, capsys):
    assert cli.main(["grade", str(folder), "--seconds", "20", "--csv", str(folder / "marks.csv")]) == 0
    out = capsys.readouterr().out
    with open(folder / "marks.csv", encoding="utf-8", newline="") as file:
        rows = {row["hand-in"].removesuffix(".ipynb"): row for row in csv.DictReader(file)}
    assert rows.keys() == HAND_INS.keys()
    for name, (_, mark, remark) in HAND_INS.items():
        assert rows[name]["01.1"] == (mark or ""), name
        assert rows[name]["remark"].startswith(remark) and bool(rows[name]["remark"]) == bool(remark), rows[name]
        line, = (line for line in out.splitlines() if line.startswith(f"{name}.ipynb "))
        assert remark in line
    assert out.splitlines()[-1] == "10 hand-ins, 5 exercises right"
    assert cli.main(["grade", str(folder), "--csv", str(folder / "marks.csv")]) == 2
    assert "marks.csv exists; --overwrite replaces it" in capsys.readouterr().err


def test_a_folder_for_each_student_is_looked_through(tmp_path):
    for name in ("ada/01.ipynb", "bo/01.ipynb", "bo/.ipynb_checkpoints/01-checkpoint.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("no notebook")
    assert [path.relative_to(tmp_path).as_posix() for path in hand_ins(tmp_path)] == ["ada/01.ipynb", "bo/01.ipynb"]
    assert [row.file for row in grade(tmp_path)] == ["ada/01.ipynb", "bo/01.ipynb"]


@pytest.mark.quick
def test_what_cannot_be_graded_is_named(tmp_path):
    for folder, seconds, message in ((tmp_path / "no", 9, "there is no folder"), (tmp_path, 9, "no notebook in")):
        with pytest.raises(FileNotFoundError, match=message):
            list(grade(folder, seconds))
    (tmp_path / "a.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="seconds is 0; it must be positive"):
        list(grade(tmp_path, 0))

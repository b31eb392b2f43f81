"""The notebooks: every rule kept, every definition equal to the package's, every exercise answered. nbval runs them."""
import importlib

import pytest

import minidiff
from minidiff.teach.check import NOT_TRIED, RIGHT, WRONG, exercises, judge
from tests import contract, rules, series

NOTEBOOKS = sorted(series.FOLDER.glob("*.ipynb"))
MIRRORS = [(path, name) for path in NOTEBOOKS for name in series.definitions(path)]
EXERCISES = [name for number in series.banks() for name in exercises(number)]
name_of = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@name_of
def test_a_notebook_keeps_every_rule(path, capsys):
    assert rules.lint(path) == []


@pytest.mark.parametrize("path, name", MIRRORS, ids=[f"{path.stem[:2]} {name}" for path, name in MIRRORS])
def test_what_the_reader_writes_equals_the_package(path, name):
    module, _, attribute = name.rpartition(".")
    home = importlib.import_module(f"minidiff.{module}") if "." in module else getattr(minidiff, module)
    package = getattr(home, attribute)
    contract.prove(series.load(path, name), package, contract.CASES[name])


def test_nothing_is_proved_that_no_notebook_defines():
    assert set(contract.CASES) == {name for _, name in MIRRORS}


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_accepts_right_answers_and_names_each_wrong_one(name):
    exercise = exercises(name[:2])[name]
    for right in (exercise.solution, *exercise.also):
        assert judge(name, right).mark == RIGHT
    assert exercise.also and len(exercise.wrong) >= 3
    for sentence, wrong in exercise.wrong.items():
        assert judge(name, wrong) == (WRONG, sentence)


@name_of
def test_the_holes_of_a_notebook_are_its_exercises_and_are_left_alone(path):
    holes = {rules.name_of(cell, "exercise:"): cell for _, cell in rules.each(rules.read(path), "code", "exercise:")}
    assert set(holes) == set(exercises(path.stem[:2]))
    for name, cell in holes.items():
        space = {"check": lambda name, f: None}
        exec(cell.source, space)
        hole = next(value for key, value in space.items() if key not in ("check", "__builtins__"))
        assert judge(name, hole).mark == NOT_TRIED


@pytest.mark.parametrize("number", series.banks())
def test_the_solutions_are_those_of_the_bank(number):
    stored = rules.read(series.FOLDER / "solutions" / f"{number}.ipynb")
    assert [cell.source for cell in stored.cells] == [cell.source for cell in series.solutions(number).cells]


@pytest.mark.parametrize("number", series.banks())
def test_the_solutions_notebook_answers_every_exercise_right(number, capsys):
    """Each cell by itself, as a reader runs it: a solution that calls what only the bank has stops there."""
    space = {}
    for cell in series.solutions(number).cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
    assert [line[:1] for line in capsys.readouterr().out.splitlines()] == [RIGHT] * len(exercises(number))

"""Exercises that answer: `check("01.1", f)` compares a reader's function with the solution and says what is wrong."""
from __future__ import annotations

import copy
import importlib
import math
import pkgutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

NOT_TRIED, RIGHT, WRONG = "○", "✓", "✗"
COLORS = {RIGHT: 32, WRONG: 31}  # ANSI: green, red
WIDE = 96  # characters that a line of a notebook has room for


@dataclass(frozen=True)
class Exercise:
    """One entry of the bank, minidiff/teach/bank/NN.py.

    Args:
        title: what is to be done. difficulty: 1 to 3 stars. minutes: how long it takes.
        solution: the function the reader is asked for.
        inputs: argument tuples on which an answer is compared with the solution; where a tensor asks for a gradient,
            so is the gradient of the answer's sum.
        wrong: known wrong answers: the sentence that each deserves -> the function, which may raise what theirs raises.
        also: right answers that are written differently, for the tests.
        rtol, atol: tolerance of the comparison.
    """

    title: str
    difficulty: int
    minutes: int
    solution: Callable
    inputs: tuple[tuple, ...]
    wrong: dict[str, Callable] = field(default_factory=dict)
    also: tuple[Callable, ...] = ()
    rtol: float = 1e-4
    atol: float = 1e-6


class Verdict(NamedTuple):
    """mark: ○ not tried, ✓ right, ✗ wrong. sentence: what to tell the reader."""

    mark: str
    sentence: str


def exercises(notebook: str) -> dict[str, Exercise]:
    """The bank of a notebook ("01"), empty if there is none.

    >>> list(exercises("01"))[0]
    '01.1'
    """
    from minidiff.teach import bank

    known = {module.name for module in pkgutil.iter_modules(bank.__path__)}
    return importlib.import_module(f"minidiff.teach.bank.{notebook}").EXERCISES if notebook in known else {}


def judge(name: str, f: Callable | Any) -> Verdict:
    """Compare an answer with the solution. Never raises.

    >>> judge("01.1", lambda betas: ...).mark
    '○'
    >>> judge("01.1", lambda betas: betas.cumprod(0)).mark
    '✗'
    """
    bank = exercises(name.partition(".")[0])
    if name not in bank:
        return Verdict(WRONG, f"there is no exercise {name}; this notebook has {', '.join(bank) or 'none'}")
    exercise = bank[name]
    if f is ... or f is None:
        return Verdict(NOT_TRIED, "not attempted yet")
    if not callable(f):
        return Verdict(WRONG, f"give the function itself, not what it returns: check({name!r}, f), without brackets")
    answers, wanted = [], [_with_slopes(exercise.solution(*row), row) for row in copy.deepcopy(exercise.inputs)]
    for row in exercise.inputs:
        given = copy.deepcopy(row)
        answers.append(_outcome(f, given))
        if isinstance(answers[-1], _Stopped):
            break
        if answers[-1] is ... or answers[-1] is None and _is_hole(f):
            return Verdict(NOT_TRIED, "not attempted yet")
        if answers[-1] is None:
            shown = "print" in getattr(getattr(f, "__code__", None), "co_names", ())
            return Verdict(WRONG, "it returns None: print shows a value, `return` hands it back" if shown else
                           "it returns None: is `return` missing?")
        if not all(_same(a, b, 0.0, 0.0) for a, b in zip(given, row)):
            return Verdict(WRONG, "it changes what it was given; make a new tensor instead of writing into the input")
    if _all_same(answers, wanted, exercise):
        return Verdict(RIGHT, exercise.title)
    for sentence, wrong in exercise.wrong.items():
        if _all_same(answers, [_outcome(wrong, copy.deepcopy(row)) for row in exercise.inputs], exercise):
            return Verdict(WRONG, sentence)
    if isinstance(answers[-1], _Stopped):
        given = ", ".join(map(_short, exercise.inputs[len(answers) - 1]))
        return Verdict(WRONG, f"it stops with {answers[-1]}; it was given ({given})")
    return Verdict(WRONG, next(_difference(row, a, b) for row, a, b in zip(exercise.inputs, answers, wanted)
                               if not _same(a, b, exercise.rtol, exercise.atol)))


def check(name: str, f: Callable | Any) -> None:
    """Print what `judge` says of an answer: ○ not attempted, ✓ right, ✗ and why.

    >>> check("01.1", lambda betas: (1 - betas).cumprod(0))
    ✓ 01.1  alpha_bar from the betas
    """
    verdict = _session[name] = judge(name, f)
    _say(verdict.mark, name, verdict.sentence)


def report() -> None:
    """Print one line per exercise of the notebooks checked in this session: also those that were never checked.

    `check.report()` in a notebook; its lines start with the mark, so that a folder of notebooks is graded by counting.
    """
    for notebook in sorted({name.partition(".")[0] for name in _session}):
        for name, exercise in exercises(notebook).items():
            verdict = _session.get(name, Verdict(NOT_TRIED, "not attempted yet"))
            _say(verdict.mark, name, exercise.title)


check.report = report
_session: dict[str, Verdict] = {}  # the last verdict of each exercise


def _say(mark: str, name: str, sentence: str) -> None:
    """A line, or several that break between words; its mark is in colour in a notebook."""
    text = textwrap.fill(f"{mark} {name}  {sentence}", WIDE, subsequent_indent=8 * " ", break_long_words=False,
                         break_on_hyphens=False)
    if mark in COLORS and "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        text = f"\x1b[1;{COLORS[mark]}m{mark}\x1b[0m{text[1:]}"
    print(text)


class _Stopped(str):
    """Not an answer: the exception with which a function stopped."""


def _is_hole(f: Callable) -> bool:
    """Whether nothing is written in a function: it names nothing, and has no number or text but its docstring."""
    code = getattr(f, "__code__", None)
    return code is not None and not code.co_names and len(code.co_varnames) == (
        code.co_argcount + code.co_kwonlyargcount) and set(code.co_consts) <= {None, ..., f.__doc__}


def _outcome(f: Callable, row: tuple) -> Any:
    """What f returns, or how it stops; the noise it draws is the same each time, so it can be a known mistake."""
    try:
        with torch.random.fork_rng(devices=[]):  # puts the generator back, for the next call and for the reader
            return _with_slopes(f(*row), row)
    except (Exception, SystemExit) as error:  # whatever a reader's code does, the notebook goes on
        return _Stopped(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _with_slopes(answer: Any, row: tuple) -> Any:
    """The answer and, behind it, the gradient of its sum by each tensor of `row` that asks for one: 0 if none comes."""
    leaves = [x for x in row if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves or answer is ... or answer is None:
        return answer
    if not (isinstance(answer, torch.Tensor) and answer.requires_grad):
        return answer, *map(torch.zeros_like, leaves)
    slopes = torch.autograd.grad(answer.sum(), leaves, allow_unused=True)
    return answer.detach(), *(torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves, slopes))


def _all_same(answers: list, wanted: list, exercise: Exercise) -> bool:
    return all(_same(a, b, exercise.rtol, exercise.atol) for a, b in zip(answers, wanted))


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two answers (numbers, tensors, arrays, tuples or lists of them) agree in shape and value."""
    if isinstance(b, (tuple, list)):
        return isinstance(a, (tuple, list)) and len(a) == len(b) and all(_same(x, y, rtol, atol) for x, y in zip(a, b))
    try:
        a, b = (torch.as_tensor(value).to(torch.complex128) for value in (a, b))
        return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    except Exception:  # not numbers, or numbers that cannot be looked at
        return a is b or type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b


def _difference(row: tuple, a: Any, b: Any) -> str:
    given = ", ".join(map(_short, row))
    return f"for ({given}) the answer is {_short(b)}, yours is {_short(a)}{_shapes(a, b)}"


def _shapes(a: Any, b: Any) -> str:
    """What is wrong with the form of an answer, whatever its numbers."""
    if isinstance(b, (tuple, list)):
        return "" if isinstance(a, (tuple, list)) and len(a) == len(b) else f"; {len(b)} separate results are asked for"
    if isinstance(b, torch.Tensor) and getattr(a, "shape", b.shape) != b.shape:
        return f"; the shape should be {tuple(b.shape)}"
    return ""


def _short(value: Any) -> str:
    """A value in a few characters and one line: tensors and arrays by their shape and first numbers."""
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_short, value)) + ")"
    try:
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
            first = ", ".join(f"{number:.3g}" for number in value.flatten()[:4].tolist())
            kind = "tensor" if isinstance(value, torch.Tensor) else "array"
            return f"{kind}{tuple(value.shape)} [{first}{', …' if math.prod(value.shape) > 4 else ''}]"
        if isinstance(value, (int, float, torch.Tensor)):
            return f"{float(value):.4g}"
        return " ".join(repr(value).split())[:60]
    except Exception:  # complex, sparse or without data, a number beyond all floats, a repr that fails
        return f"a value of type {type(value).__name__}"

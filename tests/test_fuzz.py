"""Arguments of the command line by the thousand: each set is carried out, or refused in one line with exit code 2.

`pytest tests/test_fuzz.py --hypothesis-profile long` tries 2,000 sets.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minidiff import cli
from minidiff.measure import bench, evaluate
from minidiff.train import recipes
from tests import tiny

NUMBERS = ["1", "2", "0", "-1", "3.5", "1_0", "²", "١", "1e3", "1e400", "nan", "-inf", "", "x", "9" * 20, "9" * 5000,
           "+2", ".", "16", "1000000", "--", "0.5", "7,5", "0x10", " 2"]
TEXTS = ["a red house", "", " ", "x" * 3000, "caf\udce9", "\ud800", "\x1b[2J", "日本 🏠", "--steps", "-", "a\nb", "\0"]
FILES = ["a.png", "b.jpg", "c.gif", "d.webp", "e", ".png", "a.bmp", "..", ".", "/", "no/such/a.png", "photo.png",
         "taken.png", "x" * 300 + ".png", "\udcff.png", "a\0.png", "model.safetensors", "text.png", "-a.png", "./a.png",
         "folder.png"]
NAMES = ["ddim", "euler", "nobody", "epsilon", "v_prediction", "cpu", "cuda", "mps", "float16", "sd1", "x" * 99]
MEASURED = {"model": "mini-sd", "device": "cpu", "dtype": "float32", "batch": 1, "size": 128, "step_seconds": 0.1,
            "steps_per_second": 10.0, "tflops": 0.1, "share": 0.5, "compile_seconds": None, "picture_seconds": None,
            "peak_bytes": None}
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, pictures, and what is in the way of new files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("fuzz")
    pipe = tiny.pipeline(folder / "model" / "tokenizer")
    pipe.save_pretrained(folder / "model")
    pipe.save_pretrained(folder / "model.safetensors")
    Image.new("RGB", (40, 30), "red").save(folder / "photo.png")
    (folder / "taken.png").write_text("mine")
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    return folder


def quick(run, *, size=16, data=None, init=None):
    """A recipe that does nothing."""


def options(command: str) -> list[str]:
    parser = cli._parser()
    subparsers = next(action for action in parser._actions if hasattr(action, "choices") and action.choices)
    return [name for action in subparsers.choices[command]._actions for name in action.option_strings
            if name not in ("-h", "--help", "--no-browser")]


@st.composite
def command_lines(draw, folder) -> list[str]:
    command = draw(st.sampled_from(["generate", "train", "evaluate", "info", "bench"]))
    model = [str(folder / "model"), "mini-sd", str(folder / "model.safetensors"), *FILES]
    words = {"generate": TEXTS, "train": [*recipes.RECIPES, "", "nobody"]}.get(command, model)
    line = [command, draw(st.sampled_from(words))]
    if command == "generate":
        line += ["--model", str(folder / "model"), "--steps", "1"]
    values = st.one_of(*map(st.sampled_from, (NUMBERS, TEXTS, FILES, NAMES, model)))
    for name in draw(st.lists(st.sampled_from(options(command)), max_size=4)):
        line += [name, *draw(st.lists(values, max_size=1))]
    return line


@settings(deadline=None, database=None, suppress_health_check=CHECKS)
@given(data=st.data())
def test_any_command_line_ends_with_a_sentence_or_what_was_asked(folder, monkeypatch, capsys, data):
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:                                 # what would take long
        patch.setattr(recipes, "RECIPES", dict.fromkeys(recipes.RECIPES, quick))
        patch.setattr(evaluate, "evaluate", lambda *_, **__: {})
        patch.setattr(bench, "bench", lambda *_, **__: MEASURED)
        line = data.draw(command_lines(folder))
        try:
            code = cli.main(line)
        except SystemExit as stop:                                       # of argparse
            code = stop.code
    out, err = capsys.readouterr()
    assert code in (0, 2), (line, code, err)
    assert "Traceback" not in err and (code == 0 or err.count("\n") == 1 and err.strip()), (line, err)
    assert all(c.isprintable() or c in "\n\r\t" for c in out + err), (line, out, err)
    assert (folder / "taken.png").read_bytes() == b"mine" or "--overwrite" in line
    (folder / "taken.png").write_text("mine")


def test_undecodable_arguments_are_refused_in_one_line(folder, capsys):
    assert cli.main(["generate", "caf\udce9", "--model", str(folder / "model")]) == 2
    assert "not UTF-8" in capsys.readouterr().err

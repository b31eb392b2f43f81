"""`python -m minidiff` in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def command(*words):
    return [sys.executable, "-m", "minidiff", *map(str, words)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline(folder / "tokenizer").save_pretrained(folder)
    return folder


def test_exit_codes_and_streams(model, tmp_path):
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command("generate", "a red house", "--model", model, "--steps", 1), **options)
    assert (done.returncode, done.stdout) == (0, "minidiff-0001.png\n")
    assert "Traceback" not in done.stderr
    done = subprocess.run(command("generate", "a red house", "--steps", 0), **options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_drawing(model, tmp_path):
    words = command("generate", "a red house", "--model", model, "--steps", 500, "--num-images", 999)
    # a shell that starts the tests with & has them ignore SIGINT, and what they start
    drawing = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while (said := drawing.stderr.read(1)) != "%":  # the progress bar has appeared
        assert said, "it stopped by itself"
    drawing.send_signal(signal.SIGINT)
    said = drawing.communicate(timeout=60)[1]
    assert drawing.returncode == 130 and "Traceback" not in said and "minidiff: stopped" in said
    assert list(tmp_path.iterdir()) == []

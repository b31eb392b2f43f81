"""`lab`: a reader's copies are made once and never overwritten, and JupyterLab starts without asking the network."""
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from minidiff import cli
from minidiff.io import write
from minidiff.teach import lab

FILES = ("00_start_here.ipynb", "01_forward_noising.ipynb", "solutions/01.ipynb")


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    """Three notebooks to copy from, and an empty folder to work in."""
    source = tmp_path / "shipped"
    (source / "solutions").mkdir(parents=True)
    for name in FILES:
        (source / name).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (source / "conftest.py").write_text("")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(lab, "notebooks_dir", lambda: source)
    return source


def test_notebooks_and_solutions_are_copied_and_nothing_else(tmp_path):
    copied, kept = lab.copy_notebooks("mine")
    assert [path.as_posix() for path in copied] == [f"mine/{name}" for name in FILES] and kept == []
    assert sorted(path.name for path in (tmp_path / "work" / "mine").rglob("*.*")) == sorted(
        name.split("/")[-1] for name in FILES)


def test_a_readers_work_is_never_overwritten(tmp_path):
    lab.copy_notebooks("mine")
    mine = tmp_path / "work" / "mine" / FILES[1]
    mine.write_text("my answers")
    (mine.parent / FILES[0]).unlink()
    copied, kept = lab.copy_notebooks("mine")
    assert mine.read_text() == "my answers"
    assert [path.name for path in copied] == [FILES[0]] and len(kept) == 2


def test_the_command_copies_then_opens_the_first_notebook(tmp_path, monkeypatch, capsys):
    started = []

    class Server:
        def __init__(self, command, env):
            started.append((command, env))

        def wait(self):
            return 0

    monkeypatch.setattr(lab, "subprocess", SimpleNamespace(Popen=Server))
    assert cli.main(["lab", "mine", "--no-browser"]) == 0
    command, env = started[0]
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command and "--no-browser" in command
    assert capsys.readouterr().out == "mine: 3 notebooks copied\n"
    (tmp_path / "work" / "mine" / FILES[0]).unlink()
    assert cli.main(["lab", "mine"]) == 0 and "--no-browser" not in started[1][0]
    kept = "kept as they were: 01_forward_noising.ipynb 01.ipynb"
    assert capsys.readouterr().out == f"mine: 1 notebooks copied\n{kept}\n"
    check = "import minidiff; print(minidiff.__file__)"
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sys.modules["minidiff"].__file__


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path):
    mine = tmp_path / "work" / "mine"
    mine.mkdir()
    (mine / FILES[0]).symlink_to(tmp_path / "elsewhere.ipynb")
    copied, kept = lab.copy_notebooks("mine")
    assert kept == [lab.Path("mine") / FILES[0]] and not (tmp_path / "elsewhere.ipynb").exists()


def test_a_copy_that_does_not_fit_on_the_disk_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    real = write.os.fsync
    monkeypatch.setattr(write.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert cli.main(["lab", "mine"]) == 2
    assert capsys.readouterr().err == f"minidiff: mine{os.sep}{FILES[0]}: No space left on device\n"
    assert [*(tmp_path / "work" / "mine").iterdir()] == []
    monkeypatch.setattr(write.os, "fsync", real)
    assert len(lab.copy_notebooks("mine")[0]) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process there, and nothing hears it")
def test_the_server_ends_with_the_command(tmp_path):
    script = (f"import sys; from minidiff.teach import lab; lab.notebooks_dir = lambda: lab.Path({str(tmp_path)!r}, "
              "'shipped'); lab.command = lambda *_: [sys.executable, '-c', 'import time; print(7, flush=True); "
              "time.sleep(99)']; sys.exit(lab.lab('mine'))")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != "7\n":
        pass
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "" and process.wait() == 143         # its own end and that of the server


def test_what_jupyterlab_says_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(lab, "command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(5)"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["lab", "mine"])
    assert stop.value.code == 5


def test_bad_input_is_one_sentence(shipped, monkeypatch, capsys):
    assert cli.main(["lab", str(shipped)]) == 2
    assert "is where the notebooks come from" in capsys.readouterr().err
    assert cli.main(["lab", str(shipped / "solutions")]) == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lab", "mine"]) == 2
    assert "JupyterLab is not installed; pip install" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(lab, "notebooks_dir", lambda: shipped / "none")
    assert cli.main(["lab", "mine"]) == 2
    assert "there are no notebooks in" in capsys.readouterr().err


def answer(url: str) -> bytes:
    """What a server that is just starting has to say."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                return reply.read()
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(url)


def test_jupyterlab_takes_the_options_and_serves_the_folder(tmp_path):
    lab.copy_notebooks("mine")
    command = [*lab.command("mine", browser=False), "--IdentityProvider.token=t", "--ServerApp.port_retries=100",
               "--allow-root"]
    server = subprocess.Popen(command, env=lab.environment(tmp_path / "work"), stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+)/", line):
                break
        assert FILES[0].encode() in answer(f"{found[1]}/api/contents?token=t")
    finally:
        server.terminate()
        rest = server.stderr.read()
        server.wait(20)
    assert not re.search("unrecognized|Unrecognized|invalid|Error", "".join(lines) + rest)


def test_a_class_may_get_the_notebooks_without_solutions(tmp_path):
    copied, _ = lab.copy_notebooks("mine", solutions=False)
    assert [path.name for path in copied] == list(FILES[:2])


def test_root_may_open_jupyterlab_as_in_a_container(monkeypatch):
    for user, there in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
        assert ("--allow-root" in lab.command("mine")) == there

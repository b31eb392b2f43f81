"""A reader's own copy of the notebooks, opened in JupyterLab without a network."""
from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minidiff.io.write import write_atomic

FIRST = "00_start_here.ipynb"
OFFLINE = ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
           "--LabApp.extension_manager=readonly")  # what JupyterLab would otherwise ask the network for
NEWS = "@jupyterlab/apputils-extension:announcements"
VIEW = "application/vnd.jupyter.widget-view+json"


def notebooks_dir() -> Path:
    """The folder with the notebooks that ship: that of a checkout, `minidiff/_notebooks` of an installed wheel.

    >>> notebooks_dir().name in ("notebooks", "_notebooks")
    True
    """
    package = Path(__file__).resolve().parent.parent
    wheel = package / "_notebooks"
    return wheel if wheel.is_dir() else package.parent / "notebooks"


def copy_notebooks(folder: str | Path, solutions: bool = True) -> tuple[list[Path], list[Path]]:
    """Copy the notebooks and their solutions into a folder; what is there stays as it is.

    Args:
        solutions: whether these are copied too.

    Returns:
        The files copied, and those that were there already.

    Raises:
        ValueError: the folder is the one they come from, or in it.
        FileNotFoundError: this installation has no notebooks. OSError: a copy cannot be written; it is named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first, again = copy_notebooks(folder), copy_notebooks(folder)
    >>> first[1] == again[0] == [], first[0] == again[1]
    (True, True)
    """
    source, folder = notebooks_dir(), Path(folder)
    files = sorted([*source.glob("*.ipynb"), *(source.glob("solutions/*.ipynb") if solutions else ())])
    if not files:
        raise FileNotFoundError(f"there are no notebooks in {source}; install minidiff again, or get a whole checkout")
    if source.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder} is where the notebooks come from; name another folder for your own copies")
    copied, kept = [], []
    for file in files:
        target = folder / file.relative_to(source)
        (kept if os.path.lexists(target) else copied).append(target)     # also a link that leads nowhere
    for target in copied:
        write_atomic(target, (source / target.relative_to(folder)).read_bytes())
    return copied, kept


def lab(folder: str | Path = "minidiff-notebooks", *, browser: bool = True, solutions: bool = True) -> int:
    """Copy the notebooks and open the first one in JupyterLab, until that is shut down.

    Args:
        folder: gets the copies; what is there stays as it is. browser: whether to open one. solutions: whether to copy
            those of the exercises.

    Returns:
        JupyterLab's exit code; 143 after SIGTERM, which ends it too.

    Raises:
        ValueError: JupyterLab is not installed, or see `copy_notebooks`.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError("JupyterLab is not installed; pip install -r requirements.txt, or 'minidiff[lab]'")
    copied, kept = copy_notebooks(folder, solutions)
    print(f"{folder}: {len(copied)} notebooks copied", flush=True)
    if kept:
        print("kept as they were:", *(path.name for path in kept), flush=True)
    with tempfile.TemporaryDirectory() as config:
        process = subprocess.Popen(command(folder, browser), env=environment(config))
        ended = []
        before = signal.signal(signal.SIGTERM, lambda *_: (ended.append(1), process.terminate()))
        try:
            while True:
                try:
                    code = process.wait()
                    return 128 + signal.SIGTERM if ended else code
                except KeyboardInterrupt:  # JupyterLab gets it too, and asks whether to stop
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def without_widgets(model: dict, **_: Any) -> None:
    """Take widgets out of a notebook that is to be saved: they end with their kernel. The films behind them stay.

    Args:
        model: as a contents manager of Jupyter has it, whose `pre_save_hook` this can be.

    >>> output = {"output_type": "display_data", "metadata": {}, "data": {VIEW: {}}}
    >>> book = {"metadata": {"widgets": {}}, "cells": [{"cell_type": "code", "outputs": [output]}]}
    >>> without_widgets({"type": "notebook", "content": book})
    >>> book
    {'metadata': {}, 'cells': [{'cell_type': 'code', 'outputs': []}]}
    """
    if model.get("type") != "notebook" or not isinstance(model.get("content"), dict):
        return
    model["content"]["metadata"].pop("widgets", None)
    for cell in model["content"]["cells"]:
        for out in cell.get("outputs", []):
            out.get("data", {}).pop(VIEW, None)
        if "outputs" in cell:
            cell["outputs"] = [out for out in cell["outputs"] if out.get("data", True)]


def command(folder: str | Path, browser: bool = True) -> list[str]:
    """The command line that opens the folder's first notebook; as root too, which is who works in most containers."""
    root = getattr(os, "geteuid", lambda: 1)() == 0
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={Path(folder).resolve()}",
            f"--LabApp.default_url=/lab/tree/{FIRST}", *OFFLINE,
            f"--ContentsManager.pre_save_hook={__name__}.{without_widgets.__name__}",
            *([] if browser else ["--no-browser"]), *(["--allow-root"] if root else [])]


def environment(config: str | Path) -> dict[str, str]:
    """That of JupyterLab and its kernels, which import this minidiff, installed or not, and ask no network for models.

    Args:
        config: an empty folder; gets the setting that keeps JupyterLab from offering news.
    """
    folder = Path(config) / "labconfig"
    folder.mkdir()
    (folder / "page_config.json").write_text(json.dumps({"disabledExtensions": {NEWS: True}}))
    first = {"PYTHONPATH": Path(__file__).resolve().parents[2], "JUPYTER_CONFIG_PATH": config}
    paths = {name: os.pathsep.join(filter(None, [str(path), os.environ.get(name)])) for name, path in first.items()}
    return os.environ | paths | {"HF_HUB_OFFLINE": "1"}

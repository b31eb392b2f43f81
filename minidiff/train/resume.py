"""What a run keeps on disk: checkpoints that survive a kill at any moment, and a lock against a second run."""
from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidiff.io.plain_text import read_json
from minidiff.io.weights import load_state, save_state
from minidiff.io.write import write_atomic
from minidiff.train.ema import EMA

KINDS = {"step": int, "updates": int, "seconds": int | float, "made": dict, "sha256": dict}  # in a manifest


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """The folder of a run for this process alone; of several processes that train together the first holds it.

    It is made if need be, and taken away again if nothing was put into it.

    Raises:
        ValueError: another one has it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, alone(Path(folder, 'a')), alone(Path(folder, 'a')):
    ...     pass
    Traceback (most recent call last):
    ValueError: another training is at work in ...; wait for it, or give another --out
    """
    from filelock import FileLock, Timeout

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another training is at work in {work}; wait for it, or give another --out") from error
    try:
        yield
    finally:
        lock.release()
        if [path.name for path in work.iterdir()] == ["lock"]:
            (work / "lock").unlink()
            with suppress(OSError):                                      # until one that is not empty
                for folder in made:
                    folder.rmdir()


def check(work: Path, made: dict[str, int | str | None], resumed: bool) -> None:
    """ValueError unless a run may begin, or, if it is to resume, go on as what it was.

    Args:
        work: the folder of its checkpoints. made: what its result depends on, see `Run`.

    Raises:
        ValueError: a run would be overwritten; there is nothing to resume; or it was made with other settings or data.
    """
    if not resumed:
        if _folders(work):
            raise ValueError(f"{work} holds a run already; --resume continues it, another --out keeps it")
        return
    for what, then in made_before(work).items():
        if (now := made.get(what, then)) != then:
            other = what if "other " in what else f"{what} {then!r}, not {now!r}"          # of files there are digests
            raise ValueError(f"the run was made with {other}: {work} resumes only with the options and files that it "
                             "was made with; for others give another --out")


def made_before(work: Path) -> dict[str, int | str | None]:
    """What the newest checkpoint was made with.

    Raises:
        ValueError: there is none.
    """
    return next(_manifests(work))[1]["made"]


def save_checkpoint(work: Path, net: nn.Module, average: EMA, optimizer: torch.optim.Optimizer,
                    manifest: dict[str, Any]) -> Path:
    """Write work/step-N with net, average, optimizer and, last, the manifest with their sha256; keep the newest two.

    The folder is written under a temporary name and renamed once it is whole, so a kill at any moment leaves the
    checkpoint before it in force, and so does a full disk.

    Args:
        manifest: what is to be known of the run besides: "step", "seconds", "made" and more.

    Raises:
        OSError: a file cannot be written; it is named.
    """
    final, part = work / f"step-{manifest['step']:07d}", work / "unfinished"
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_state(net.state_dict(), part / "net.safetensors")
        save_state(average.net.state_dict(), part / "ema.safetensors")
        state = io.BytesIO()
        torch.save(optimizer.state_dict(), state)
        write_atomic(part / "optimizer.pt", state.getvalue())
        files = {file.name: _sha256(file) for file in sorted(part.iterdir())}
        whole = {**manifest, "updates": average.updates, "sha256": files}
        write_atomic(part / "manifest.json", json.dumps(whole, indent=1))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in _folders(work)[2:]:
        shutil.rmtree(old)
    return final


def resume(work: Path, net: nn.Module, average: EMA, optimizer: torch.optim.Optimizer,
           how: dict[str, Any]) -> dict[str, Any]:
    """Load the newest checkpoint whose sha256 sums agree. Returns its manifest.

    Args:
        how: what the bits depend on, such as the number of threads; a warning says what was otherwise.

    Raises:
        ValueError: there is none, or it is of a network of another shape.
    """
    for folder, manifest in _manifests(work):                # which ends with an error
        try:
            intact = all(_sha256(folder / file) == digest for file, digest in manifest["sha256"].items())
        except OSError:
            continue
        if intact:
            state, wanted = load_state(folder / "net.safetensors"), net.state_dict()
            then, now = ({(key, tensor.shape) for key, tensor in each.items()} for each in (state, wanted))
            if changed := sorted(then ^ now):
                raise ValueError(f"the run was made with a network of another shape, in {changed[0][0]}: {work} "
                                 "resumes only with the options that it was made with, such as --size and --init")
            net.load_state_dict(state)  # copied in place: the optimizer holds these
            average.net.load_state_dict(load_state(folder / "ema.safetensors"))
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            average.updates = manifest["updates"]
            before = manifest.get("how", how)
            if others := [f"{key} {before.get(key)} (now {now})" for key, now in how.items() if before.get(key) != now]:
                warnings.warn(f"the run so far had {', '.join(others)}: it goes on, but the last digits will differ "
                              "from those of a run in one piece", stacklevel=3)
            return manifest


def _folders(work: Path) -> list[Path]:
    """The folders of checkpoints, the newest first."""
    found = [path for path in work.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _manifests(work: Path) -> Iterator[tuple[Path, dict]]:
    """The checkpoints whose manifest can be read, the newest first.

    Raises:
        ValueError: once there are no more: so who finds what he looks for never sees it.
    """
    folders = _folders(work)
    for folder in folders:
        try:
            manifest = read_json(folder / "manifest.json")
            if all(isinstance(manifest[key], kind) for key, kind in KINDS.items()):
                yield folder, manifest
        except (OSError, ValueError, KeyError):
            continue
    raise ValueError(f"nothing to resume: no whole checkpoint in {work}; "
                     + ("they are damaged: give another --out" if folders else "start without --resume"))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

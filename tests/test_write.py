"""Files are written all or nothing, and what cannot be written is named."""
import pytest

from minidiff.io import write
from minidiff.io.weights import save_state
from minidiff.io.write import append, write_atomic

pytestmark = pytest.mark.quick


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", b"old")
    monkeypatch.setattr(write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full.*x'"):
        write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    import torch

    (tmp_path / "folder").mkdir()
    for call in (lambda path: append(path, "x"), lambda path: write_atomic(path, "x")):
        with pytest.raises(OSError) as error:
            call(tmp_path / "folder")
        assert str(tmp_path / "folder") in str(error.value)
    from safetensors import SafetensorError
    from safetensors import torch as files

    monkeypatch.setattr(files, "save_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError("no space")))
    with pytest.raises(OSError, match="a.safetensors cannot be written: no space"):
        save_state({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

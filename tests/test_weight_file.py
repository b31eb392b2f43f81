"""One weight file: what is none is named, and nothing in one ever runs."""
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from minidiff.io.weight_file import read_notes
from minidiff.io.weights import load_state, save_state
from tests import tiny

pytestmark = pytest.mark.quick
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_reads_pytorch_files_of_both_formats(tmp_path, ending, legacy):
    torch.save(STATE, tmp_path / f"net{ending}", _use_new_zipfile_serialization=not legacy)
    assert tiny.equal(load_state(tmp_path / f"net{ending}"), STATE)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS pointer"),
    (b"\n<!DOCTYPE html><html>404</html>", "web page"), (b"1234567", "truncated|garbled"),
    (b"\x00" * 200, "truncated|garbled"), (os.urandom(300), "truncated|garbled")],
    ids=["empty", "lfs", "html", "short", "zeros", "noise"])
def test_what_is_no_weight_file_is_named(tmp_path, content, message, ending):
    path = tmp_path / f"net{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_state(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_the_other_format_says_what_its_name_should_be(tmp_path):
    torch.save(STATE, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="is a file of torch.save under another name: let it end in .ckpt"):
        load_state(tmp_path / "net.safetensors")
    save_file(STATE, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match="is a safetensors file under another name: let it end in .safetensors"):
        load_state(tmp_path / "net.ckpt")
    (tmp_path / "net.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="net.ckpt is garbled or truncated$"):
        load_state(tmp_path / "net.ckpt")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, ending, share):
    path = tmp_path / f"net{ending}"
    big = {"a": torch.zeros(5000)}
    torch.save(big, path) if ending == ".bin" else save_file(big, path)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="garbled or truncated|truncated or no safetensors"):
        load_state(path)


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "net.bin").write_bytes(pickle.dumps({"weight": Trap()}, protocol=2))
    torch.save({"weight": Trap()}, tmp_path / "zip.bin")
    for name in ("net.bin", "zip.bin"):
        with pytest.raises(ValueError, match="would run code to load, which minidiff never does") as error:
            load_state(tmp_path / name)
        assert "weights_only" not in str(error.value)  # torch's advice to load it unsafely is not passed on
    assert not (tmp_path / "sprung").exists()


def test_a_path_that_is_not_utf8_is_read(tmp_path):
    folder = tmp_path / "caf\udce9"                                      # as Python reads the byte 0xe9
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("names are UTF-8 here")
    save_state(STATE, folder / "a.safetensors", {"said": "yes"})
    (tmp_path / "a.pt").write_bytes(b"")
    torch.save(STATE, tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(folder / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert tiny.equal(load_state(folder / name), STATE)
    assert load_state(folder / "a.safetensors", headers=True)["weight"].shape == (2, 3)
    assert read_notes(folder / "a.safetensors")["said"] == "yes"


def test_programs_and_pictures_are_called_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"x/{name}", "3")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="a TorchScript program, which minidiff never runs"):
        warnings.simplefilter("error")
        load_state(tmp_path / "x.pt")
    for head in (b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"RIFF0000WEBP"):
        (tmp_path / "x.pt").write_bytes(head + bytes(99))
        with pytest.raises(ValueError, match="x.pt is a picture, not weights"):
            load_state(tmp_path / "x.pt")

"""Weight files: formats, variants, shards, strictness, and one clear sentence for every way a file can be wrong."""

import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff.io import weights
from minidiff.io.weight_file import read_notes, read_object
from minidiff.io.weights import load_state, load_strict, read_json, save_state, write_atomic
from minidiff.nets.vae import VAE, VAEConfig

pytestmark = pytest.mark.quick

STEM = "diffusion_pytorch_model"
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt"])
def test_reads_pytorch_files_of_both_formats(tmp_path, ending, legacy):
    torch.save(STATE, tmp_path / f"net{ending}", _use_new_zipfile_serialization=not legacy)
    assert equal(load_state(tmp_path / f"net{ending}"), STATE)


@pytest.mark.parametrize("stem, variant, name", [
    (STEM, None, f"{STEM}.safetensors"), (STEM, "fp16", f"{STEM}.fp16.safetensors"), (STEM, None, f"{STEM}.bin"),
    ("model", None, "model.safetensors"), ("model", None, "pytorch_model.bin"),
    ("model", "fp16", "pytorch_model.fp16.bin")])
def test_finds_the_file_in_a_folder(tmp_path, stem, variant, name):
    (torch.save if name.endswith(".bin") else save_file)(STATE, tmp_path / name)
    assert equal(load_state(tmp_path, stem, variant), STATE)


def test_prefers_safetensors_and_the_variant_that_was_asked_for(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / f"{STEM}.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / f"{STEM}.fp16.safetensors")
    torch.save({"a": torch.full((1,), 2.0)}, tmp_path / f"{STEM}.bin")
    assert load_state(tmp_path)["a"] == 0
    assert load_state(tmp_path, variant="fp16")["a"] == 1


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_reads_shards(tmp_path, variant):
    tag = f".{variant}" if variant else ""
    where = {key: f"{STEM}{tag}-0000{i}-of-00002.safetensors" for i, key in enumerate(STATE, 1)}
    for key, name in where.items():
        save_file({key: STATE[key]}, tmp_path / name)
    (tmp_path / f"{STEM}.safetensors.index{tag}.json").write_text(json.dumps({"weight_map": where}))
    assert equal(load_state(tmp_path, variant=variant), STATE)
    (tmp_path / where["bias"]).unlink()
    with pytest.raises(FileNotFoundError, match="there is no weight file .*00002-of-00002"):
        load_state(tmp_path, variant=variant)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "sub\\x.safetensors", "C:x"])
def test_a_shard_index_cannot_point_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, tmp_path / "secret.safetensors")
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(ValueError, match="points out of its folder"):
        load_state(folder)


def test_a_missing_file_says_what_was_looked_for_and_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no weight file"):
        load_state(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=f"looked for {STEM}.safetensors or {STEM}.bin in .*no weights"):
        load_state(tmp_path)
    save_file(STATE, tmp_path / f"{STEM}.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=f"only {STEM}.fp16.safetensors; variant='fp16' would take it"):
        load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="looked for model.ema.safetensors or pytorch_model.ema.bin"):
        load_state(tmp_path, "model", "ema")


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


def test_a_file_that_holds_something_else_is_an_error(tmp_path):
    torch.save({"step": 3, "weight": torch.zeros(1)}, tmp_path / "net.bin")
    with pytest.raises(ValueError, match="flat dictionary of tensors"):
        load_state(tmp_path / "net.bin")


@pytest.mark.parametrize("state, message", [
    ({"weight": STATE["weight"]}, "missing: bias$"),
    ({**STATE, "scale": torch.ones(1)}, "unexpected: scale$"),
    ({**STATE, "weight": torch.zeros(3, 2)}, r"of the wrong shape: weight \[3, 2\] instead of \[2, 3\]$"),
    ({f"w{i:02}": torch.ones(1) for i in range(13)}, "missing: bias, weight; unexpected: w00, .*w09 and 3 more$"),
    ({**STATE, "bias": torch.tensor([1, 2])}, "not of real numbers: bias$"),
    ({**STATE, "bias": torch.tensor([1.0, float("nan")])}, "NaN or infinite numbers in bias"),
    ({**STATE, "bias": torch.tensor([1.0, float("-inf")])}, "NaN or infinite numbers in bias"),
    ({**STATE, "bias": torch.tensor([1, float("inf")], dtype=torch.float16)}, "NaN or infinite numbers in bias")])
def test_strict_loading_lists_what_does_not_fit_and_leaves_the_net_alone(state, message):
    net = nn.Linear(3, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_strict(net, state, "some file")
    assert equal(net.state_dict(), before)


def test_large_but_finite_numbers_load():
    net = nn.Linear(3, 2, device="meta")
    load_strict(net, {"weight": torch.full((2, 3), 3e38), "bias": torch.full((2,), 65504.0).half()})
    assert net.weight.max() == 3e38 and net.weight.requires_grad


def test_saving_unties_and_makes_contiguous(tmp_path):
    tied = torch.randn(4, 6, 3, 3)
    state = {"a": tied, "b": tied, "c": tied[1:3], "d": tied.to(memory_format=torch.channels_last), "e": tied[0, 0].T}
    save_state(state, tmp_path / "x.safetensors")
    assert equal(load_file(tmp_path / "x.safetensors"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", b"old")
    monkeypatch.setattr(weights.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config.json in"):
        read_json(tmp_path / "config.json")
    for text, message in (("", "is empty"), ("{", "is not valid JSON"), ("[1]", "should hold a JSON object"),
                          ("<html>", "web page"), ("version https://git-lfs x", "git-LFS")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_a_net_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    net = VAE(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4))
    net.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "new" / "folder", dtype=torch.float16)
    assert {v.dtype for v in load_state(tmp_path / "new" / "folder").values()} == {torch.float16}
    for dtype in (None, torch.float16, torch.float64):
        again = VAE.from_pretrained(tmp_path / "new" / "folder", dtype=dtype)
        assert not again.training and again.config == net.config
        for key, value in again.state_dict().items():
            assert value.dtype == (dtype or torch.float32)
            assert torch.equal(value, net.state_dict()[key].half().to(value.dtype))


def test_a_loaded_net_trains_without_touching_the_file(tmp_path):
    VAE(VAEConfig(block_out_channels=(8,), norm_num_groups=4)).save_pretrained(tmp_path)
    file = tmp_path / f"{STEM}.safetensors"
    before = file.read_bytes()
    net = VAE.from_pretrained(tmp_path).train()
    net(torch.ones(1, 3, 4, 4)).square().mean().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert file.read_bytes() == before
    net.save_pretrained(tmp_path)
    assert file.read_bytes() != before


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_parameter_dict_is_read_and_nothing_in_it_runs(tmp_path, old, legacy):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for more in ({}, {"trap": Trap(), "count": np.float64(2.5)}):
        held = nn.ParameterDict({"*": nn.Parameter(torch.arange(6.0).view(2, 3))})
        if old:                                                          # torch < 1.12 wrote no list of keys
            del held.__dict__["_keys"]
        held._forward_hooks.update(more)
        torch.save({"held": held, **more}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        found = read_object(tmp_path / "x.pt")["held"]
        assert found.keys() == {"*"} and torch.equal(found["*"], torch.arange(6.0).view(2, 3))
        assert load_state(tmp_path / "x.pt").keys() == {"*"}
    assert not (tmp_path / "sprung").exists()


def test_an_old_file_that_lies_about_its_storages_is_garbled(tmp_path):
    torch.save({"a": torch.zeros(3), "none": torch.zeros(0), "b": os.system}, tmp_path / "x.pt",
               _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    assert torch.equal(read_object(tmp_path / "x.pt")["a"], torch.zeros(3))
    (tmp_path / "x.pt").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="x.pt is garbled or truncated"):
        read_object(tmp_path / "x.pt")


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {"state": {0: {"x": torch.ones(1)}}}},
    lambda s: {"module": s, "loss": np.float64(0.5)}, lambda s: {"params_ema": s}, lambda s: {"model": {"net": s}},
    lambda s: {"state_dict": s, "ema_state_dict": {k: 2 * v for k, v in s.items()}},
    lambda s: {f"module.{k}": v for k, v in s.items()}, lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()}])
def test_the_tensors_are_found_in_what_trainers_wrap_around_them(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "x.ckpt")
    found = load_state(tmp_path / "x.ckpt")
    assert found.keys() == STATE.keys() and all(torch.equal(found[k], v) for k, v in STATE.items())


def test_of_several_dictionaries_none_is_taken_and_what_is_no_tensor_is_named(tmp_path):
    for content, message in (({"params": STATE, "params_ema": STATE}, "several dictionaries .*: params, params_ema"),
                             ({**STATE, "step": 3}, "flat dictionary of tensors; its step is a int"),
                             ({0: torch.ones(1)}, "tensors by their names; 0 is no name"),
                             ([torch.ones(1)], "flat dictionary of tensors, not a list")):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=message) as error:
            load_state(tmp_path / "x.ckpt")
        assert "\n" not in str(error.value)
    loop = {"a": 1}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="flat dictionary of tensors"):
        load_state(tmp_path / "x.ckpt")


def test_a_missing_variant_is_only_advised_where_it_exists(tmp_path):
    for name, advice in ((f"{STEM}.fp16.bin", "'fp16'"), (f"{STEM}.fp16-00001-of-00002.safetensors", ""),
                         (f"{STEM}-00001-of-00002.safetensors", ""), ("another.fp16.safetensors", "")):
        folder = tmp_path / name
        folder.mkdir()
        save_file(STATE, folder / name)
        with pytest.raises(FileNotFoundError) as error:
            load_state(folder)
        assert str(error.value).endswith(f"; variant={advice} would take it, in Python" if advice else name)
    (folder / f"{STEM}.safetensors.index.fp16.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="; variant='fp16' would take it"):
        load_state(folder)
    (tmp_path / "plain").mkdir()
    save_file(STATE, tmp_path / "plain" / f"{STEM}.safetensors")
    with pytest.raises(FileNotFoundError, match="; variant=None would take it"):
        load_state(tmp_path / "plain", variant="fp16")
    with pytest.raises(FileNotFoundError, match="there is no folder|there is no weight file"):
        load_state(tmp_path / "nowhere")


def test_configs_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_numbers_of_eight_bits_are_looked_at(tmp_path):
    net = nn.Linear(2, 1, bias=False, device="meta")
    load_strict(net, {"weight": torch.ones(1, 2).to(torch.float8_e4m3fn)})
    assert net.weight.float().tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="NaN or infinite numbers in weight"):
        load_strict(net, {"weight": torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn)})


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
        assert equal(load_state(folder / name), STATE)
    assert load_state(folder / "a.safetensors", headers=True)["weight"].shape == (2, 3)
    assert read_notes(folder / "a.safetensors")["said"] == "yes"


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta")])
def test_tensors_that_are_not_plain_are_named(tmp_path, tensor):
    torch.save({"a": torch.ones(1), "odd": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt should hold plain tensors; .*: odd"):
        load_state(tmp_path / "x.pt")


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


def test_all_that_is_in_the_shards_is_read_wherever_the_index_says_it_is(tmp_path):
    for name, key in (("a", "weight"), ("b", "bias")):
        save_file({key: STATE[key]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / f"{STEM}.safetensors.index.json"
    for where in ({"weight": "b", "bias": "a"}, {"weight": "a", "another": "b"}):
        index.write_text(json.dumps({"weight_map": {key: f"{name}.safetensors" for key, name in where.items()}}))
        assert equal(load_state(tmp_path), STATE)
    index.write_text(json.dumps({"weight_map": {"weight": ""}}))
    with pytest.raises(ValueError, match="has no weight_map from tensor names to files"):
        load_state(tmp_path)


def test_an_old_file_cut_off_in_an_empty_storage_is_garbled(tmp_path):
    torch.save({"none": torch.zeros(0), "b": os.system}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-5])
    with pytest.raises(ValueError, match="x.pt is garbled or truncated"):
        read_object(tmp_path / "x.pt")

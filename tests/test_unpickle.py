"""Pickles of trainers and of old versions of torch: read without running anything in them."""
import fractions
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from minidiff.io.unpickle import Stub, _Unpickler, load_tensors
from minidiff.io.weight_file import read_object
from minidiff.io.weights import load_state
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny

pytestmark = pytest.mark.quick
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


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


def test_an_old_file_cut_off_in_an_empty_storage_is_garbled(tmp_path):
    torch.save({"none": torch.zeros(0), "b": os.system}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-5])
    with pytest.raises(ValueError, match="x.pt is garbled or truncated"):
        read_object(tmp_path / "x.pt")


def test_checkpoints_of_old_trainers_load_without_running_their_code(model, state, tmp_path):
    """As with the original files: callbacks, keyed by their class, beside a nested state_dict."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"state_dict": state, "global_step": 470000, "callbacks": {fractions.Fraction: {"best": Trap()}},
                "optimizer_states": [{"x": fractions.Fraction(3)}]}, tmp_path / "old.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.ckpt", weights_only=True)
    pipe = StableDiffusion.from_pretrained(tmp_path / "old.ckpt", config=model / "folder", device="cpu")
    assert tiny.same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))
    assert not (tmp_path / "sprung").exists()
    content = load_tensors(tmp_path / "old.ckpt")
    assert isinstance(content["optimizer_states"][0]["x"], Stub) and content["global_step"] == 470000


@pytest.mark.parametrize("make", [
    lambda: torch.randn(3, 4).T, lambda: torch.nn.Parameter(torch.randn(5)), lambda: torch.randn(4, 4)[1:3, ::2],
    lambda: torch.arange(6).reshape(2, 3), lambda: torch.randn(3).half(), lambda: torch.randn(3).bfloat16(),
    lambda: torch.tensor([True, False]), lambda: torch.zeros(0, 3), lambda: torch.tensor(2.5, dtype=torch.float64),
    lambda: torch.tensor([1, 255], dtype=torch.uint8)])
def test_the_restricted_reader_reads_every_tensor_as_torch_does(tmp_path, make):
    tensor = make()
    torch.save({"a": tensor, "b": tensor, "c": Exception}, tmp_path / "x.ckpt")
    found = load_tensors(tmp_path / "x.ckpt")
    assert torch.equal(found["a"], tensor) and found["a"].dtype == tensor.dtype and issubclass(found["c"], Stub)


def test_the_restricted_reader_maps_the_file_and_checks_its_bounds(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as old, zipfile.ZipFile(tmp_path / "y.ckpt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:8] if name.endswith("data/0") else content)
    with pytest.raises(RuntimeError, match="resize"):
        load_tensors(tmp_path / "y.ckpt")


def test_what_only_looks_like_tensors_would_run_code_and_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return eval, (f"__import__('os').mkdir({str(tmp_path / 'sprung')!r})",)

    for content in ({"weight": Trap()}, {"state_dict": {"weight": Trap()}}, Trap(), [Trap()]):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="would run code to load|flat dictionary of tensors"):
            load_state(tmp_path / "x.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_a_stub_takes_everything_that_a_pickle_does():
    """INST, NEWOBJ + BUILD, REDUCE + APPENDS, REDUCE + SETITEMS on a name that is none, and of a function that is."""
    for name in (b"nowhere\nNothing\n", b"os\nsystem\n"):
        for code in (b"(K\x01i" + name + b".", b"c" + name + b")\x81}b.", b"c" + name + b"(K\x01tR(K\x01K\x02e.",
                     b"c" + name + b")R(K\x01K\x02u."):
            assert isinstance(_Unpickler(io.BytesIO(code)).load(), Stub)

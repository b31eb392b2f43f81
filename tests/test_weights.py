"""Weight files: formats, variants, shards, strictness, and one clear sentence for every way a file can be wrong."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff.io.weights import load_state, load_strict, save_state
from minidiff.nets.vae import VAE, VAEConfig
from tests import tiny

pytestmark = pytest.mark.quick
STEM = "diffusion_pytorch_model"
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize("stem, variant, name", [
    (STEM, None, f"{STEM}.safetensors"), (STEM, "fp16", f"{STEM}.fp16.safetensors"), (STEM, None, f"{STEM}.bin"),
    ("model", None, "model.safetensors"), ("model", None, "pytorch_model.bin"),
    ("model", "fp16", "pytorch_model.fp16.bin")])
def test_finds_the_file_in_a_folder(tmp_path, stem, variant, name):
    (torch.save if name.endswith(".bin") else save_file)(STATE, tmp_path / name)
    assert tiny.equal(load_state(tmp_path, stem, variant), STATE)


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
    assert tiny.equal(load_state(tmp_path, variant=variant), STATE)
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
    assert tiny.equal(net.state_dict(), before)


def test_large_but_finite_numbers_load():
    net = nn.Linear(3, 2, device="meta")
    load_strict(net, {"weight": torch.full((2, 3), 3e38), "bias": torch.full((2,), 65504.0).half()})
    assert net.weight.max() == 3e38 and net.weight.requires_grad


def test_saving_unties_and_makes_contiguous(tmp_path):
    tied = torch.randn(4, 6, 3, 3)
    state = {"a": tied, "b": tied, "c": tied[1:3], "d": tied.to(memory_format=torch.channels_last), "e": tied[0, 0].T}
    save_state(state, tmp_path / "x.safetensors")
    assert tiny.equal(load_file(tmp_path / "x.safetensors"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


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


def test_a_missing_variant_is_only_advised_where_it_exists(tmp_path):
    for name, advice in ((f"{STEM}.fp16.bin", "'fp16'"), (f"{STEM}.fp16-00001-of-00002.safetensors", ""),
                         (f"{STEM}-00001-of-00002.safetensors", ""), ("another.fp16.safetensors", "")):
        folder = tmp_path / name
        folder.mkdir()
        save_file(STATE, folder / name)
        with pytest.raises(FileNotFoundError) as error:
            load_state(folder)
        assert str(error.value).endswith(f"; variant={advice} would take it" if advice else name)
    (folder / f"{STEM}.safetensors.index.fp16.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="; variant='fp16' would take it"):
        load_state(folder)
    (tmp_path / "plain").mkdir()
    save_file(STATE, tmp_path / "plain" / f"{STEM}.safetensors")
    with pytest.raises(FileNotFoundError, match="; variant=None would take it"):
        load_state(tmp_path / "plain", variant="fp16")
    with pytest.raises(FileNotFoundError, match="there is no folder|there is no weight file"):
        load_state(tmp_path / "nowhere")


def test_numbers_of_eight_bits_are_looked_at(tmp_path):
    net = nn.Linear(2, 1, bias=False, device="meta")
    load_strict(net, {"weight": torch.ones(1, 2).to(torch.float8_e4m3fn)})
    assert net.weight.float().tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="NaN or infinite numbers in weight"):
        load_strict(net, {"weight": torch.tensor([[1.0, torch.nan]]).to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta")])
def test_tensors_that_are_not_plain_are_named(tmp_path, tensor):
    torch.save({"a": torch.ones(1), "odd": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt should hold plain tensors; .*: odd"):
        load_state(tmp_path / "x.pt")


def test_all_that_is_in_the_shards_is_read_wherever_the_index_says_it_is(tmp_path):
    for name, key in (("a", "weight"), ("b", "bias")):
        save_file({key: STATE[key]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / f"{STEM}.safetensors.index.json"
    for where in ({"weight": "b", "bias": "a"}, {"weight": "a", "another": "b"}):
        index.write_text(json.dumps({"weight_map": {key: f"{name}.safetensors" for key, name in where.items()}}))
        assert tiny.equal(load_state(tmp_path), STATE)
    index.write_text(json.dumps({"weight_map": {"weight": ""}}))
    with pytest.raises(ValueError, match="has no weight_map from tensor names to files"):
        load_state(tmp_path)

"""Finding a model: paths, the cache of huggingface_hub, and the network only where it is asked for."""

import sys

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from minidiff.io import hub
from minidiff.io.weights import weights_dir
from minidiff.sd.pipeline import StableDiffusion

pytestmark = pytest.mark.quick


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--someone--a-model"


def snapshot(cache, commit, main=False):
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    if main:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
    return folder


def test_a_path_of_yours_goes_before_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.find_adapter("cat") == weights_dir() / "cat" and hub.find_adapter("dog").name == "dog"
    (tmp_path / "cat").mkdir()
    assert hub.find_adapter("cat").resolve() == tmp_path / "cat"


def test_both_models_that_ship_go_by_their_names():
    for name in ("mini-sd", "mini-sd-lcm"):
        assert (hub.find(name) / "model_index.json").is_file() and hub.find(name).name == name
    with pytest.raises(FileNotFoundError, match="one of mini-sd, mini-sd-lcm, which ship here"):
        hub.find("mini-sd-xl")


def test_a_repository_is_taken_from_the_cache(cache):
    _, main = snapshot(cache, "1111"), snapshot(cache, "2222", main=True)
    assert hub.find("someone/a-model") == main


def test_a_snapshot_that_main_does_not_name_is_not_taken(cache):
    snapshot(cache, "1111")
    with pytest.raises(FileNotFoundError, match="no such repository in the cache"):
        hub.find("someone/a-model")


def test_offline_it_says_what_is_missing_and_where_it_looked(cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"no folder someone/a-model, .*cache {cache.parent}; download=True"):
        StableDiffusion.from_pretrained("someone/a-model")
    snapshot(cache, "1111", main=True)
    with pytest.raises(FileNotFoundError, match="there is no model_index.json in .*snapshots.1111"):
        StableDiffusion.from_pretrained("someone/a-model")
    for source in ("nowhere", "some/where/else", "some/model.safetensors", "C:\\models\\x"):
        with pytest.raises(FileNotFoundError, match="there is no model .*; give a folder, a file, or one of mini-sd"):
            hub.find(source, download=True)


def test_download_completes_what_is_in_the_cache_and_says_why_it_cannot(cache, monkeypatch):
    there = snapshot(cache, "1111", main=True)
    asked = []

    def snapshot_download(name, local_files_only=False, **_):
        if local_files_only:
            return str(there)
        asked.append(name)
        if name == "someone/nothing":
            raise ConnectionError("no such\nrepository")
        (there / "unet").mkdir(exist_ok=True)
        (there / "unet" / "net.fp16.safetensors").touch()
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find("someone/a-model", "fp16") == there and asked == []
    assert hub.find("someone/a-model", "fp16", download=True) == there and asked == ["someone/a-model"]
    with pytest.raises(FileNotFoundError, match=f"someone/nothing cannot be fetched .*cache {cache.parent}: no such$"):
        hub.find("someone/nothing", download=True)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_download_fetches_what_is_needed_and_nothing_else(cache, monkeypatch, tmp_path, ending):
    choose = filter_repo_objects
    there = ["model_index.json", "unet/config.json", "tokenizer/merges.txt", f"unet/net{ending}",
             f"unet/net.fp16{ending}",
             f"vae/net-00001-of-00002{ending}", f"vae/net.fp16-00001-of-00002{ending}", f"safety_checker/net{ending}",
             "big.safetensors", "big.ckpt", "unet/net.onnx", "vae_decoder/model.onnx"]
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        for path in choose(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "got" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "got" / path).touch()
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = hub.find("someone/a-model", download=True)
    got = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert got == {"model_index.json", "unet/config.json", f"unet/net{ending}", "tokenizer/merges.txt",
                   f"vae/net-00001-of-00002{ending}"}
    hub.find("someone/a-model", variant="fp16", download=True)
    got = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()} - got
    assert got == {f"unet/net.fp16{ending}", f"vae/net.fp16-00001-of-00002{ending}"}
    assert set(asked) == {"someone/a-model"}


def test_what_is_there_is_found_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub.find("mini-sd") == weights_dir() / "mini-sd" and hub.find(tmp_path, download=True) == tmp_path

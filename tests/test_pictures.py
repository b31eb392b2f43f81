"""The pictures of the recipes: caches know what they were made from, and a run resumes only as what it was."""
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidiff.data import drawing, scenes
from minidiff.io.tokenizer import load_tokenizer, train_tokenizer
from minidiff.io.weights import load_state, weights_dir
from minidiff.train import pictures, recipes
from minidiff.train.recipes import mini_sd
from minidiff.train.trainer import Run, batch_indices, train
from tests import tiny

pytestmark = pytest.mark.quick
OTHER = "the run was made with other pictures or captions"


def folder_of(path, color, words="a {}", n=4):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (16, 16), color).save(path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": words.format(color)} for i in range(n)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cats(tmp_path):
    return folder_of(tmp_path / "cats" / "train", "red")


@pytest.fixture
def few(monkeypatch):
    """Two drawings instead of 120,000, in this process."""
    monkeypatch.setattr(pictures, "DRAWINGS", 2)
    def draw(*args, **options):
        images, drawn = scenes.render(*args, **options)
        return pictures.Pictures.of(images), drawn

    monkeypatch.setattr(pictures, "draw", draw)


def everything(images) -> torch.Tensor:
    return images[torch.arange(len(images))]


def learn(run: Run, *, size=16, data=None, init=None):
    """A recipe of one layer, which looks at its pictures alone."""
    images, captions = pictures.dataset(run, size, data)
    torch.manual_seed(run.seed)
    net = nn.Linear(3 * size * size, 1)

    def loss(net, step, share):
        rows = batch_indices(len(images), 2, step, run.seed)[share]
        return {"loss": net(pictures.from_bytes(images[rows]).flatten(1)).square().mean()}

    train("toy", net, loss, run, batch=2, lr=1e-3)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """toy(**options): that recipe, into one folder."""
    monkeypatch.setitem(recipes.RECIPES, "toy", learn)
    monkeypatch.setitem(recipes.STEPS, "toy", 1)
    return lambda **options: recipes.run("toy", **{"out": tmp_path / "out", "device": "cpu", **options})


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path, cats):
    dogs = folder_of(tmp_path / "dogs" / "train", "blue")
    run = Run(tmp_path / "out", 1)
    for data, color, words in ((cats, [255, 0, 0], "a red"), (dogs, [0, 0, 255], "a blue")) * 2:
        found, captions = pictures.dataset(run, 16, data)
        assert everything(found)[0, :, 0, 0].tolist() == color and captions == [[words]] * 4


@pytest.mark.parametrize("change", ["picture", "caption", "fewer", "order", "size"])
def test_a_folder_that_changed_is_read_again(tmp_path, cats, change):
    """Even where the file that changed has the same size and time as before."""
    run, size = Run(tmp_path / "out", 1), 16
    file, text = cats / "3.png", cats / "metadata.jsonl"
    lines = text.read_text().splitlines()
    Image.new("RGB", (16, 16), "blue").save(file, compress_level=0)
    (before, said), times = pictures.dataset(run, size, cats), [os.stat(path).st_mtime for path in (file, text)]
    if change == "picture":
        length = file.stat().st_size
        Image.new("RGB", (16, 16), "lime").save(file, compress_level=0)
        assert file.stat().st_size == length
    elif change == "size":
        size = 32
    else:
        new = {"caption": [lines[0].replace("red", "cat"), *lines[1:]], "fewer": lines[1:], "order": lines[::-1]}
        text.write_text("\n".join(new[change]))
    for path, time in zip((file, text), times):
        os.utime(path, (time, time))
    after, now = pictures.dataset(run, size, cats)
    before, after = everything(before), everything(after)
    assert now != said or after.shape != before.shape or not after.equal(before)
    again, _ = pictures.dataset(run, size, cats)
    assert everything(again).equal(after)


@pytest.mark.parametrize("change", ["seed", "number", "wordings", "words", "colour"])
def test_drawings_are_made_again_when_they_would_be_others(tmp_path, few, monkeypatch, change):
    seed = 0
    before, said = pictures.dataset(Run(tmp_path, 1), 16, None)
    if change == "seed":
        seed = 1
    elif change == "number":
        monkeypatch.setattr(pictures, "DRAWINGS", 3)
    elif change == "wordings":
        monkeypatch.setattr(pictures, "WORDINGS", 2)
    elif change == "words":
        monkeypatch.setattr(scenes, "SIZE_WORDS", {"small": ("minute",), "large": ("vast",)})
    else:
        for name in drawing.RGB:
            monkeypatch.setitem(drawing.RGB, name, (1, 2, 3))
    after, now = pictures.dataset(Run(tmp_path, 1, seed=seed), 16, None)
    want, drawn = scenes.render(pictures.DRAWINGS, 16, seed=seed)
    assert everything(after).equal(want) and now == pictures.captioned(drawn, seed)
    assert now != said or not everything(after).equal(everything(before))


def test_what_has_not_changed_is_not_made_again(tmp_path, few, cats, monkeypatch):
    run = Run(tmp_path / "out", 1)
    first = [pictures.dataset(run, 16, data) for data in (cats, None)]
    monkeypatch.setattr(pictures, "draw", None)
    monkeypatch.setattr(pictures, "png", None)
    moved = cats.rename(tmp_path / "train")
    for (images, captions), data in zip(first, (moved, None)):
        found, said = pictures.dataset(run, 16, data)
        assert everything(found).equal(everything(images)) and said == captions


def test_a_cache_of_an_earlier_version_is_made_again(tmp_path, cats):
    pictures.save_state({"pictures": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)},
                        tmp_path / "out/train/pictures-16-train.safetensors")
    assert everything(pictures.dataset(Run(tmp_path / "out", 1), 16, cats)[0]).any()


def test_latents_are_those_of_their_pictures_and_vocabulary(tmp_path, cats):
    run = Run(tmp_path / "out", 1, device="cpu")
    pipe = tiny.pipeline(run.out / "tokenizer")
    pipe.vae.save_pretrained(run.out / "vae")
    red, _, ids = pictures.latents(run, 16, cats)
    folder_of(cats, "blue")
    blue, _, other = pictures.latents(run, 16, cats)
    assert not torch.equal(red, blue) and not torch.equal(ids, other)
    train_tokenizer(["a blue"] * 9, run.out / "tokenizer")
    assert not torch.equal(pictures.latents(run, 16, cats)[2], other)


def test_16_bit_and_transparent_files_are_learnt_from_as_they_look(tmp_path):
    folder = folder_of(tmp_path, "red", n=2)
    Image.fromarray(np.full((16, 16), 90 * 257, np.uint16)).save(folder / "0.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(folder / "1.png")
    found = everything(pictures.dataset(Run(tmp_path / "out", 1), 16, folder)[0])
    assert (found[0] == 90).all() and (found[1] == 255).all()


def test_a_run_resumes_only_with_what_it_was_made_with(toy, tmp_path, cats):
    toy(data=cats, size=16)
    for options, said in (({"data": cats, "size": 32}, "the run was made with size 16, not 32"),
                          ({"data": cats, "seed": 1}, "the run was made with seed 0, not 1"),
                          ({"data": folder_of(tmp_path / "dogs/train", "blue")}, OTHER),
                          ({"data": folder_of(tmp_path / "captions", "red", "one {}")}, OTHER),
                          ({"data": None}, OTHER),
                          ({"data": cats, "init": cats}, "other weights to start from")):
        with pytest.raises(ValueError, match=f"{said}.*resumes only with the options and files"):
            toy(**{"size": 16, **options}, resume=True, steps=2)
    assert not (tmp_path / "out/train/pictures-32-train.safetensors").exists()  # it is said before anything is made
    toy(data=cats, size=np.int64(16), resume=True, steps=np.int64(2))
    assert (tmp_path / "out/train/toy/step-0000002").is_dir()
    folder_of(cats, "blue")
    with pytest.raises(ValueError, match=OTHER):
        toy(data=cats, resume=True, steps=3)


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b"\xff\xfe", b"[1]", b'{"loss": 1}'])
def test_a_log_that_was_not_finished_is_no_obstacle(toy, tmp_path, cats, torn):
    toy(data=cats)
    log = tmp_path / "out/logs/toy.jsonl"
    log.write_bytes(log.read_bytes() + torn)
    toy(data=cats, resume=True, steps=2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_run_begins_again_with_what_is_asked_for(toy, tmp_path, cats):
    toy(data=cats)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it, another --out keeps it"):
        toy(data=folder_of(tmp_path / "dogs/train", "blue"))
    (tmp_path / "out/train/toy").rename(tmp_path / "kept")
    toy(data=tmp_path / "dogs/train")
    assert pictures.dataset(Run(tmp_path / "out", 1), 16, tmp_path / "dogs/train")[1] == [["a blue"]] * 4


@pytest.mark.parametrize("options, said", [
    ({"size": True}, "size is True"), ({"size": 32.0}, "size is 32.0"), ({"size": -16}, "size is -16"),
    ({"steps": 2.5}, "steps is 2.5"), ({"steps": True}, "steps is True"), ({"seed": 2**32}, "seed is 4294967296"),
    ({"seed": -1}, "seed is -1"), ({"seconds": float("nan")}, "seconds is nan"), ({"threads": 0}, "threads is 0"),
    ({"threads": -1}, "threads is -1"), ({"device": "gpu"}, "there is no device 'gpu' here; cpu always works")])
def test_options_of_another_kind_are_named(toy, options, said, cats):
    with pytest.raises(ValueError, match=said):
        toy(**{"data": cats, **options})


class Begun(Exception):
    """The training would begin."""


def test_clip_learns_the_vocabulary_of_its_own_captions(tmp_path, cats, monkeypatch):
    """Not that of an earlier data set, found in its folder; a run that goes on keeps its own."""
    def begin(name, net, loss, run, **_):
        raise Begun(run.made["another vocabulary"])

    monkeypatch.setattr(mini_sd, "train", begin)
    monkeypatch.setattr(recipes, "check", lambda *_: None)
    monkeypatch.setattr(recipes, "made_before", lambda _: {})
    dogs = folder_of(tmp_path / "dogs/train", "blue", "an unusual {} dog")
    made, words = [], []
    for data, resume in ((cats, False), (dogs, False), (cats, True)):
        with pytest.raises(Begun) as begun:
            recipes.run("clip", out=tmp_path / "out", size=16, data=data, device="cpu", resume=resume)
        made.append(str(begun.value))
        words.append(load_tokenizer(tmp_path / "out/tokenizer").encode("an unusual blue dog").tokens)
    assert made[0] != made[1] == made[2] and len(words[0]) == len(words[1]) == 77
    assert "unusual</w>" in words[1] and "unusual</w>" not in words[0] and words[2] == words[1]


def test_weights_to_start_from_must_fit(tmp_path, cats, monkeypatch):
    monkeypatch.setattr(recipes, "check", lambda *_: None)
    monkeypatch.setattr(mini_sd, "train", lambda name, net, *_, **__: net)
    pipe = tiny.pipeline(tmp_path / "words")
    pipe.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="unet are made for in_channels 4, this run needs 3"):
        recipes.run("pixels", out=tmp_path / "out", size=16, data=cats, init=tmp_path / "unet", device="cpu")


def test_a_short_run_draws_few_and_a_longer_one_takes_them_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "DRAWINGS", 40)
    run = Run(tmp_path, 1, made={"drawings": 8})
    few, said = pictures.dataset(run, 16, None)
    cache = tmp_path / "train/pictures-16.safetensors"
    assert len(few) == len(said) == 8
    assert f"minidiff: 8 pictures are kept in {cache} for later runs, 0.0 MB; delete it when" in capsys.readouterr().err
    many, captions = pictures.dataset(Run(tmp_path, 1), 16, None)
    assert len(many) == len(captions) == 40 and torch.equal(everything(few), everything(many)[:8])
    capsys.readouterr()
    monkeypatch.setattr(pictures, "draw", None)                              # the larger cache serves both
    again, words = pictures.dataset(run, 16, None)
    assert torch.equal(everything(again), everything(few)) and words == said == captions[:8]
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_keeps_its_drawings_however_long_it_becomes(tmp_path, monkeypatch):
    seen = []

    def toy(run, **_):
        seen.append(pictures.drawings(run))
        train("toy", nn.Linear(1, 1), lambda net, step, share: {"loss": net(torch.ones(1)).sum() ** 2}, run, batch=1,
              lr=1e-3)

    monkeypatch.setitem(recipes.RECIPES, "toy", toy)
    for steps, batch, resume in ((2, 8, False), (3, 50_000, True)):
        recipes.run("toy", out=tmp_path, steps=steps, device="cpu", resume=resume, size=16,
                    **({} if resume else {"batch": batch}))
    assert seen == [1000, 1000]
    with pytest.raises(ValueError, match="the run was made with batch 8, not 4"):
        recipes.run("toy", out=tmp_path, steps=4, device="cpu", resume=True, size=16, batch=4)


def test_few_pictures_make_a_small_batch_which_is_said(tmp_path, cats, monkeypatch):
    batches = []
    monkeypatch.setattr(mini_sd, "train", lambda name, net, loss, run, batch, **_: batches.append(batch) or net)
    for options in ({}, {"batch": 3}):
        with pytest.warns(UserWarning, match="4 pictures are fewer than a batch of 256: it is 4 now") if not options \
                else warnings.catch_warnings(action="error"):
            recipes.run("clip", out=tmp_path / str(len(options)), size=16, data=cats, device="cpu", steps=1, **options)
    assert batches == [4, 3]


@pytest.mark.parametrize("init", ["mini-sd", "folder", "part"])
def test_a_unet_goes_on_from_a_whole_model_or_its_part(tmp_path, cats, monkeypatch, init):
    """Of a whole model the other parts come along, unless the folder has its own."""
    model = weights_dir() / "mini-sd"
    monkeypatch.setattr(mini_sd, "train", lambda name, nets, loss, run, **_: loss(nets, 0, slice(0, 4)) and nets)
    if init == "part":
        for part in ("vae", "text_encoder", "tokenizer"):
            shutil.copytree(model / part, tmp_path / "out" / part)
    start = {"mini-sd": "mini-sd", "folder": model, "part": model / "unet"}[init]
    with pytest.warns(UserWarning, match="4 pictures are fewer than a batch of 64"):
        recipes.run("unet", out=tmp_path / "out", size=128, data=cats, device="cpu", steps=1, init=start)
    assert tiny.equal(*[load_state(folder / "unet") for folder in (model, tmp_path / "out")])
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_bytes() == (model / "tokenizer/vocab.json").read_bytes()


def test_what_a_recipe_cannot_go_on_from_is_named(tmp_path, cats):
    options = {"out": tmp_path / "out", "data": cats, "device": "cpu", "steps": 1}
    for name, message in (("clip", "whole model; clip does not go on from one, but from the two towers in train/clip"),
                          ("pixels", "whole model; pixels does not go on from one")):
        with pytest.raises(ValueError, match=message):
            recipes.run(name, init="mini-sd", **options)
    shutil.copytree(weights_dir() / "mini-sd" / "scheduler", tmp_path / "v" / "scheduler")
    (tmp_path / "v" / "model_index.json").write_text("{}")
    (tmp_path / "v/scheduler/scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(ValueError, match="predicts v_prediction; unet goes on from models with one, that predict eps"):
        recipes.run("unet", init=tmp_path / "v", **options)
    for device in ("banana", "meta"):
        with pytest.raises(ValueError, match=f"there is no device '{device}' here; cpu always works"):
            recipes.run("vae", **options | {"device": device})


def test_a_unet_that_cannot_begin_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        recipes.run("unet", init="mini-sd", out=tmp_path / "out", data=tmp_path / "no", device="cpu", steps=1)
    assert not (tmp_path / "out").exists()

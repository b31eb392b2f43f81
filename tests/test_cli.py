"""The command line as a user meets it: what it writes, what it prints, and one line for whatever is wrong."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageChops

from minidiff import cli, samplers
from minidiff.data import scenes
from minidiff.io.lora import Change, save_lora
from minidiff.io.weights import load_state, save_state
from minidiff.nets.controlnet import ControlNet
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.scheduler import NAMES
from tests import tiny

pytestmark = pytest.mark.quick
EXAMPLE = cli.EXAMPLE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline(folder / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capfd):
    """run("generate", …) in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = cli.main([*map(str, words)])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def draw(run, model):
    """generate with the tiny model in two steps."""
    return lambda *words: run("generate", "--model", model, "--steps", 2, *(words or ["a red house"]))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(result, *words):
    """One line on stderr that names the words, exit code 2, no traceback."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


def test_generate_takes_the_next_free_number_and_prints_it(draw, tmp_path):
    assert draw()[:2] == (0, "minidiff-0001.png\n")
    assert draw()[:2] == (0, "minidiff-0002.png\n")
    assert Image.open(tmp_path / "minidiff-0001.png").size == (32, 32)


def test_names_that_are_almost_numbers_are_not_counted(draw, tmp_path):
    for name in ("²", "x", "0007", ""):
        (tmp_path / f"minidiff-{name}.png").touch()
    assert draw()[1].split()[0] == "minidiff-0008.png"


def test_generate_draws_what_the_pipeline_draws(draw, model, tmp_path):
    draw("a red house", "--seed", 3, "--sampler", "euler_ancestral", "--guidance-scale", 2, "--num-images", 2,
         "--negative-prompt", "a tree")
    want = StableDiffusion.from_pretrained(model, device="cpu")(
        "a red house", seed=3, sampler="euler_ancestral", guidance_scale=2.0, num_images=2, negative_prompt="a tree",
        steps=2)
    for i, image in enumerate(want, 1):
        assert ImageChops.difference(image, Image.open(tmp_path / f"minidiff-000{i}.png")).getbbox() is None


def test_a_single_file_is_drawn_from_with_a_tokenizer_and_a_config(run, model, tmp_path):
    StableDiffusion.from_pretrained(model, device="cpu").save_pretrained(tmp_path / "m.safetensors")
    words = ["generate", "--model", "m.safetensors", "--steps", 2, "a red house", "--no-metadata"]
    refused(run(*words), "m.safetensors is of no family that minidiff knows", "give --config")
    assert run(*words, "--config", model, "--out", "one.png")[0] == 0
    assert run(*words, "--config", model, "--tokenizer", model / "tokenizer", "--out", "two.png")[0] == 0
    assert run("generate", "--model", model, *words[3:], "--out", "three.png")[0] == 0
    assert len({(tmp_path / name).read_bytes() for name in ("one.png", "two.png", "three.png")}) == 1


def test_the_size_is_that_of_the_model_or_another(draw, tmp_path):
    Image.new("RGB", (90, 60)).save(tmp_path / "photo.png")
    assert draw("a red house", "--size", 48, "--out", "own.png")[0] == 0
    assert draw("a red house", "--size", 48, "--init-image", "photo.png", "--out", "of.png")[0] == 0
    assert Image.open(tmp_path / "own.png").size == Image.open(tmp_path / "of.png").size == (48, 48)
    refused(draw("a red house", "--size", 47), "47")
    refused(draw("a red house", "--size", 0), "0")


def test_grid_puts_all_pictures_into_one_file(draw, tmp_path):
    code, out, _ = draw("a red house", "--num-images", 4, "--grid", "--out", "four.png")
    assert code == 0 and out.split() == ["four.png"]
    assert Image.open(tmp_path / "four.png").size == (64, 64)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_a_film_shows_every_step(draw, tmp_path, suffix):
    code, out, _ = draw("a red house", "--steps", 4, "--film", f"film{suffix}", "--out", "x.png")
    assert code == 0 and out.split()[-1] == f"film{suffix}"
    film = Image.open(tmp_path / f"film{suffix}")
    assert film.n_frames == 5 and film.width > 512


def test_an_init_image_of_any_size_is_redrawn(draw, tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "photo.jpg")
    code, _, _ = draw("a red house", "--init-image", "photo.jpg", "--strength", 1, "--out", "a.png")
    assert code == 0 and Image.open(tmp_path / "a.png").size == (32, 32)
    draw("a red house", "--out", "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_mask_says_what_of_the_init_image_is_repainted(draw, model, tmp_path):
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    mask = Image.new("L", (48, 40))
    mask.paste(255, (0, 0, 24, 40))
    mask.save(tmp_path / "mask.png")
    code, _, _ = draw("a red house", "--init-image", "photo.png", "--mask", "mask.png", "--out", "a.png")
    assert code == 0
    code, _, said = draw("a red house", "--mask", "mask.png", "--out", "b.png")
    assert code == 2 and "--mask needs --init-image, the picture to repaint" in said


def test_an_empty_prompt_is_allowed(draw):
    assert draw("")[0] == 0


def test_the_words_that_do_not_fit_are_named(draw):
    code, _, err = draw("red " * 75 + "house, night")
    lost, how = err.splitlines()
    assert code == 0 and "left out: house, night" in lost and "2 steps of ddim" in how


@pytest.mark.parametrize(("words", "said"), [
    (["--steps", 0], "minidiff: --steps is 0"), (["--steps", -1], "steps is -1"), (["--steps", 1001], "steps is 1001"),
    (["--steps", "many"], "--steps"), (["--sampler", "magic"], "unknown sampler 'magic'; there are ddim, ddpm"),
    (["--seed", -1], "seed is -1"), (["--num-images", 0], "minidiff: --num-images is 0"),
    (["--guidance-scale", "nan"], "minidiff: --guidance-scale is nan"),
    (["--guidance-scale", "inf"], "--guidance-scale is inf"), (["--control-scale", 1], "--control-scale needs --contr"),
    (["--strength", 2], "strength is 2"), (["--film", "film.mp4"], "film.mp4 should end in .png, .gif or .webp"),
    (["--out", "house.txt"], "house.txt should end in"), (["--out", "."], "should end in"),
    (["--out", ".png"], "the picture .png should end in .png, .jpg, .jpeg, .webp, behind a name"),
    (["--film", ".gif"], "the film .gif should end in .png, .gif or .webp, behind a name"),
    (["--out", "same.png", "--film", "same.png"], "the same name"),
    (["--init-image", "nowhere.png"], "no picture file nowhere.png"),
    (["--model", "nowhere"], "no model nowhere"), (["--colour", "red"], "--colour")])
def test_bad_input_gets_one_line(draw, tmp_path, words, said):
    refused(draw("a red house", *words), said)
    assert files(tmp_path) == []


def test_a_prompt_of_other_bytes_gets_one_line(draw, run):
    for words in (("caf\udce9",), ("red", "--negative-prompt", "\udcff")):
        refused(run("generate", *words), "holds bytes that are not UTF-8")


def test_the_prediction_can_be_stated(draw, tmp_path):
    pictures = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        draw("red", "--steps", 2, "--prediction-type", kind, "--out", f"{kind}.png")
        pictures[kind] = Image.open(tmp_path / f"{kind}.png").tobytes()
    draw("red", "--steps", 2, "--out", "unsaid.png")
    assert Image.open(tmp_path / "unsaid.png").tobytes() == pictures["epsilon"] and len(set(pictures.values())) == 3
    refused(draw("red", "--prediction-type", "v"), "--prediction-type is 'v'; supported are epsilon, sample")


def test_a_missing_prompt_or_command_gets_one_line(run):
    refused(run("generate"), "PROMPT")
    refused(run(), "COMMAND")
    refused(run("paint"), "paint")


def test_what_exists_is_kept_unless_overwrite(draw, tmp_path):
    for name in ("house.png", "film.gif"):
        (tmp_path / name).write_text("mine")
    refused(draw("a red house", "--out", "house.png"), "house.png exists", "--overwrite")
    refused(draw("a red house", "--film", "film.gif"), "film.gif exists")
    assert (tmp_path / "house.png").read_text() == (tmp_path / "film.gif").read_text() == "mine"
    assert draw("a red house", "--out", "house.png", "--film", "film.gif", "--overwrite")[0] == 0
    assert files(tmp_path) == ["film.gif", "house.png"]
    assert Image.open(tmp_path / "film.gif").n_frames == 3


def test_a_name_that_another_took_meanwhile_is_not_taken_from_it(draw, tmp_path, monkeypatch):
    from minidiff.io import images

    encode = images.to_pil

    def meanwhile(pixels):
        (tmp_path / "minidiff-0001.png").write_text("of another process")
        return encode(pixels)

    monkeypatch.setattr(images, "to_pil", meanwhile)
    assert draw("a red house", "--num-images", 2)[1].split() == ["minidiff-0002.png", "minidiff-0003.png"]
    assert (tmp_path / "minidiff-0001.png").read_text() == "of another process"
    full = OSError(28, "No space left", "x.png")
    monkeypatch.setattr(images, "save_image", lambda *_, **__: (_ for _ in ()).throw(full))
    before = files(tmp_path)
    refused(draw("a red house"), "x.png: No space left")
    assert files(tmp_path) == before


def test_json_is_written_over_nothing_that_is_there(run, model, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    for words in (("bench", model, "--steps", 1, "--pairs", 1), ("evaluate", model, "-n", 1, "--steps", 1)):
        refused(run(*words, "--json", "mine.json"), "mine.json exists; --overwrite replaces it")
    refused(run("evaluate", model, "--json", "a.png", "--out", "a.png"), "the same name: a.png, a.png")
    film = "--film", f"../{tmp_path.name}/a.png"
    refused(run("generate", "a house", "--model", model, *film, "--out", "a.png"), "have the same name")
    assert (tmp_path / "mine.json").read_text() == "{}" and files(tmp_path) == ["mine.json"]


def test_a_path_that_cannot_be_written_is_named_before_drawing(draw, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(StableDiffusion, "stream", lambda *a, **k: pytest.fail("it began to draw"))
    refused(draw("a red house", "--out", "file/house.png"), "cannot write into file")
    refused(draw("a red house", "--out", "folder.png"), "folder.png is a folder")
    if sys.platform == "linux":
        refused(draw("a red house", "--out", "/proc/house.png"), "cannot write into /proc")


def test_a_failure_while_writing_leaves_what_was_there(draw, tmp_path, monkeypatch):
    (tmp_path / "house.png").write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    refused(draw("a red house", "--out", "house.png", "--overwrite"), "No space left")
    assert (tmp_path / "house.png").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\nxxxx", b"<html></html>"])
def test_an_unreadable_init_image_is_named(draw, tmp_path, content):
    (tmp_path / "photo.png").write_bytes(content)
    refused(draw("a red house", "--init-image", "photo.png"), "photo.png cannot be read as a picture")


def test_a_truncated_or_huge_init_image_is_named(draw, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    refused(draw("a red house", "--init-image", "half.png"), "half.png cannot be read")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    refused(draw("a red house", "--init-image", "bomb.png"), "bomb.png is too large")


@pytest.fixture
def broken(model, tmp_path):
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json",
                                  "text_encoder/model.safetensors", "tokenizer/vocab.json",
                                  "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbled"])
def test_a_damaged_model_gets_one_line(run, broken, tmp_path, part, damage):
    path = broken / part
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "garbled": b"\xff" * len(data)}[damage])
    result = run("generate", "a red house", "--model", broken)
    refused(result, "broken")
    assert files(tmp_path) == ["broken"]


def test_nan_weights_get_one_line(run, broken):
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_state(path).items()}
    state["conv_in.bias"][0] = torch.nan
    save_state(state, path)
    refused(run("generate", "a red house", "--model", broken), "NaN", "conv_in.bias")


def test_ctrl_c_stops_without_a_trace(draw, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "stream", stop)
    code, out, err = draw()
    assert code == 130 and out == "" and err.count("\n") == 1 and files(tmp_path) == []


def test_a_terminated_training_says_so_and_exits_with_143(run, monkeypatch):
    from minidiff.train import recipes, trainer

    def end(*_, **__):
        raise trainer.Terminated("vae stopped at step 7; --resume continues it")

    monkeypatch.setattr(recipes, "run", end)
    assert run("train", "vae") == (143, "", "minidiff: vae stopped at step 7; --resume continues it\n")


def test_train_lists_its_recipes(run):
    code, out, _ = run("train", "--list")
    assert code == 0 and {line.split()[0] for line in out.splitlines()} >= {"reader", "clip", "vae", "unet"}


def test_train_passes_its_options_on(run, monkeypatch):
    from minidiff.train import recipes

    seen = {}
    monkeypatch.setattr(recipes, "run", lambda name, **options: seen.update(options, name=name) or "runs/vae")
    code, out, _ = run("train", "vae", "--out", "runs/vae", "--steps", 5, "--seconds", 2.5, "--size", 32,
                       "--device", "cpu", "--threads", 1, "--data", "d", "--init", "i", "--resume",
                       "--batch", 3)
    assert code == 0 and out == "runs/vae\n"
    assert seen == {"name": "vae", "out": "runs/vae", "steps": 5, "seconds": 2.5, "size": 32, "device": "cpu",
                    "threads": 1, "data": "d", "init": "i", "resume": True, "batch": 3}


def test_train_refuses_in_one_line(run):
    refused(run("train", "magic"), "unknown recipe 'magic'")
    refused(run("train"), "which recipe?")
    refused(run("train", "vae", "--size", 30), "size is 30")


def test_evaluate_refuses_in_one_line(run):
    refused(run("evaluate", "nowhere"), "no model nowhere")
    refused(run("evaluate", "-n", 0), "n is 0")
    refused(run("evaluate", "--out", __file__), "should end in")


def test_two_files_of_one_name_are_refused_however_it_is_written(draw, run, tmp_path):
    film = tmp_path / ".." / tmp_path.name / "a.png"
    refused(draw("a red house", "--out", tmp_path / "a.png", "--film", film), "two files to write have the same name")
    refused(run("evaluate", "--out", tmp_path / "a.png", "--json", film), "two files to write have the same name")
    assert files(tmp_path) == []


def test_evaluate_prints_its_numbers(run, monkeypatch):
    from minidiff.measure import evaluate

    share = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: calls.append(k) or {
        "attribute_accuracy": 0.5, "picture_accuracy": share, "per_attribute": {"color": share}})
    code, out, _ = run("evaluate", "mini-sd", "-n", 10, "--steps", 5)
    assert code == 0 and calls[0]["n"] == 10 and calls[0]["steps"] == 5
    assert [line.split("  ")[0] for line in out.splitlines()] == ["attribute_accuracy", "picture_accuracy",
                                                                  "per_attribute: color", "minidiff-0001.png"]
    assert str(calls[0]["sheet_path"]) == "minidiff-0001.png"


def test_info_counts_parameters(run, model):
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    code, out, _ = run("info", model, "--json")
    found = json.loads(out)
    assert code == 0
    for name, net in (("unet", pipe.unet), ("vae", pipe.vae), ("text_encoder", pipe.text.encoders[0])):
        assert found["parts"][name]["parameters"] == sum(p.numel() for p in net.parameters())
    assert (found["prediction_type"], found["scheduler"], found["dtype"]) == ("epsilon", "DDIMScheduler", "float32")
    assert run("info", model)[1].splitlines()[2] == "predicts epsilon, scheduler DDIMScheduler"
    assert run("info", model)[0] == run("info", model / "unet")[0] == 0
    code, out, _ = run("info", model / "vae" / "diffusion_pytorch_model.safetensors")
    assert code == 0 and "VAE" in out


def test_info_refuses_in_one_line(run, tmp_path):
    refused(run("info", "nowhere"), "nowhere")
    (tmp_path / "x.safetensors").write_bytes(b"")
    refused(run("info", tmp_path / "x.safetensors"), "x.safetensors is empty")


def test_help_shows_vocabulary_samplers_and_an_example(run):
    code, out, _ = run("generate", "--help")
    assert code == 0 and EXAMPLE in out
    assert all(word in out for values in scenes.ATTRIBUTES.values() for word in values)
    assert all(option in out for option in ("--film", "--init-image", "--overwrite", "--num-images"))
    assert all(name in run("--help")[1] for name in ("generate", "train", "evaluate", "info"))


def test_the_samplers_in_the_help_are_those_there_are():
    assert cli.SAMPLERS == tuple(samplers.SAMPLERS) and set(cli.SAMPLERS) == set(NAMES)
    assert all(callable(getattr(samplers, name)) for name in NAMES)


@pytest.mark.parametrize("encoding, printed", [("cp1252", "\\u732b"), ("ascii", "\\u732b"), ("utf-8", "猫")])
def test_a_name_that_the_terminal_cannot_print_is_no_failure(model, tmp_path, monkeypatch, encoding, printed):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    words = ["--model", str(model), "--steps", "2", "--out", str(tmp_path / "猫.png")]
    assert cli.main(["generate", "a red house", *words]) == 0
    stem = f"{tmp_path}{os.sep}{printed}"
    assert out.buffer.getvalue().decode(encoding).split() == [f"{stem}.png"]
    assert files(tmp_path) == ["猫.png"]
    assert cli.main(["info", str(tmp_path / "犬")]) == 2
    err.flush()
    assert err.buffer.getvalue().decode(encoding).count("\n") == 2       # how it was drawn, and what is not there


@pytest.mark.skipif(sys.platform == "win32", reason="file names are text there")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_is_no_text_is_no_failure(model, tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    words = ["--model", str(model), "--steps", "2", "--out", os.fsdecode(bytes(tmp_path) + b"/\xff.png")]
    assert cli.main(["generate", "a red house", *words]) == 0
    assert b"udcff.png" in sys.stdout.buffer.getvalue()
    assert sorted(os.listdir(bytes(tmp_path))) == [b"\xff.png"]


def test_closed_output_is_no_failure(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    words = ["--model", str(model), "--steps", "2", "--out", str(tmp_path / "a.png")]
    assert cli.main(["generate", "a red house", *words]) == 0
    assert files(tmp_path) == ["a.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise there")
def test_who_stops_reading_the_output_is_no_failure():
    command = f"{sys.executable} -m minidiff train --list"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mask_must_have_the_proportions_of_its_picture(draw, tmp_path):
    Image.new("RGB", (48, 40), "red").save(tmp_path / "photo.png")
    Image.new("L", (40, 48), 255).save(tmp_path / "mask.png")
    refused(draw("a red house", "--init-image", "photo.png", "--mask", "mask.png"),
            "--mask is 40×48 pixels, --init-image 48×40", "same proportions")
    Image.new("L", (97, 80), 255).save(tmp_path / "large.png")
    assert draw("a red house", "--init-image", "photo.png", "--mask", "large.png", "--out", "a.png")[0] == 0


def test_16_bits_and_transparency_count_at_every_door_of_the_command_line(draw, model, tmp_path):
    """A file in 16 bits or with transparency draws what its plain twin draws; in a mask what is transparent stays."""
    net = ControlNet.from_unet(StableDiffusion.from_pretrained(model).unet, (4, 8, 8))
    torch.nn.init.ones_(net.controlnet_mid_block.weight)
    net.save_pretrained(tmp_path / "net")
    Image.new("L", (32, 32), 90).save(tmp_path / "plain.png")
    Image.frombytes("I;16", (32, 32), (90 * 257).to_bytes(2, "little") * 1024).save(tmp_path / "deep.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")

    def drawn(name, *words):
        assert draw("a red house", *words, "--out", f"out-{name}", "--overwrite", "--no-metadata")[0] == 0
        return (tmp_path / f"out-{name}").read_bytes()

    for a, b in (("plain.png", "deep.png"), ("white.png", "clear.png")):
        assert drawn(a, "--init-image", a) == drawn(b, "--init-image", b)
        told = [drawn(name, "--controlnet", "net", "--control-image", name) for name in (a, b)]
        assert told[0] == told[1]
    for a, b in (("plain.png", "deep.png"), ("black.png", "clear.png")):
        assert drawn(a, "--init-image", "white.png", "--mask", a) == drawn(b, "--init-image", "white.png", "--mask", b)


def test_a_seed_that_would_draw_another_ones_picture_gets_one_line(draw):
    refused(draw("a red house", "--seed", 2**32), "seed is 4294967296; it must be a whole number from 0 to 4294967295")
    refused(draw("a red house", "--seed", 2**32 - 1, "--num-images", 2), "the last of 2 pictures would have 4294967296")


def test_loras_are_loaded_with_their_scales(draw, tmp_path):
    change = Change(torch.ones(1, 16, 3, 3), torch.ones(4, 1, 1, 1), 0.2)
    save_lora({"unet.conv_out": change}, tmp_path / "a=b.safetensors")
    save_lora({"unet.conv_out": change}, tmp_path / "c.safetensors")
    for name, words in (("plain", []), ("with", ["--lora", "a=b.safetensors"]),
                        ("sum", ["--lora", "a=b.safetensors=1.5", "--lora", "c.safetensors=-0.5"]),
                        ("off", ["--lora", "c.safetensors=0"])):
        assert draw("a red house", *words, "--out", f"{name}.png")[0] == 0
    picture = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ("plain", "with", "sum", "off")}
    assert picture["plain"] == picture["off"] != picture["with"] == picture["sum"]
    refused(draw("a red house", "--lora", "nowhere.safetensors"), "nowhere.safetensors")
    refused(draw("a red house", "--lora", "c.safetensors=nan"), "scale is nan; it must be a finite number")


def test_a_controlnet_is_told_a_picture(draw, model, tmp_path):
    net = ControlNet.from_unet(StableDiffusion.from_pretrained(model).unet, (4, 8, 8))
    torch.nn.init.ones_(net.controlnet_mid_block.weight)
    net.save_pretrained(tmp_path / "net")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "hint.png")
    assert draw("a red house", "--out", "plain.png")[0] == 0
    assert draw("a red house", "--controlnet", "net", "--control-image", "hint.png", "--out", "told.png")[0] == 0
    assert Image.open(tmp_path / "plain.png").tobytes() != Image.open(tmp_path / "told.png").tobytes()
    refused(draw("a red house", "--controlnet", "net"), "--controlnet and --control-image go together")
    refused(draw("a red house", "--controlnet", "net", "--control-image", "no.png"), "no picture file no.png")

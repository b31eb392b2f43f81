"""Drawing to files: every option of the command line as a user gives it, and pictures that say how they were made."""
import json

import pytest
import torch
from PIL import Image, ImageChops

from minidiff import cli, generate
from minidiff.data import scenes
from minidiff.io import parameters
from minidiff.io.lora import Change, save_lora
from minidiff.io.weights import load_state, save_state
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny

pytestmark = pytest.mark.quick
LORA, HUB = "a red house<lora:ink:0.5>", "models--someone--tiny"
LONG = "red " * 80 + "house"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a user's: a model in every form, beside it what goes into pictures."""
    place = tmp_path_factory.mktemp("place")
    pipe = tiny.pipeline(place / "model" / "tokenizer")
    pipe.save_pretrained(place / "model")
    file = place / "model" / "unet" / "diffusion_pytorch_model.safetensors"  # of a variant that draws otherwise
    state = {name: tensor.clone() for name, tensor in load_state(file).items()}
    save_state(state | {"conv_out.bias": state["conv_out.bias"] + 1}, file.with_name(f"{file.stem}.fp16.safetensors"))
    pipe.save_pretrained(place / "one.safetensors")
    snapshot = place / "hub" / HUB / "snapshots" / "abc"
    pipe.save_pretrained(snapshot)
    (place / "hub" / HUB / "refs").mkdir()
    (place / "hub" / HUB / "refs" / "main").write_text("abc")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = VAE(VAEConfig.from_dict(tiny.VAE_))
    other.save_pretrained(place / "vae")
    save_state(dict(other.state_dict()), place / "vae.safetensors")
    change = Change(torch.ones(1, 16, 3, 3), torch.ones(4, 1, 1, 1), 0.2)
    save_lora({"unet.conv_out": change}, place / "ink.safetensors")
    save_state({"emb_params": torch.full((2, 24), 3.0)}, place / "cat.safetensors")
    tiny.controlnet(pipe).save_pretrained(place / "net")
    Image.new("RGB", (40, 40), "red").save(place / "photo.png")
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 20, 40))
    half.save(place / "mask.png")
    (place / "prompts.txt").write_text("# two of them\na red house\n\na tree\n", encoding="utf-8")
    return place


@pytest.fixture
def draw(place, tmp_path, monkeypatch, capfd):
    """draw("a red house", "--steps", 3) in a copy of the place, with the small model -> its pictures, as bytes."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))

    def draw(*words, steps=("--steps", "3"), model=("--model", "model")):
        before = set(tmp_path.iterdir())
        out = () if "--out" in words else ("--out", str(tmp_path / f"{len(before)}.png"))
        assert cli.main(["generate", *words, *steps, *model, *out]) == 0, capfd.readouterr().err
        capfd.readouterr()
        return [Image.open(path).tobytes() for path in sorted(set(tmp_path.iterdir()) - before)]

    return draw


RED = "a red house"
NET = ("--controlnet", "net", "--control-image", "photo.png")
ALIKE, OTHER = True, False  # whether the picture is that of `plain`
CALLS = {  # option -> a command line with it, one that it is compared with, and whether they draw the same
    "--prompts": (["--prompts", "prompts.txt"], None, None),
    "--like": (["--like", "PICTURE"], [RED, "--seed", "5"], ALIKE),
    "--negative-prompt": ([RED, "--negative-prompt", "a tree"], [RED], OTHER),
    "--weights": (["a (red:1.0) house", "--weights"], [RED], ALIKE),
    "--long": ([LONG, "--long"], [LONG], OTHER),
    "--clip-skip": ([RED, "--clip-skip", "1"], [RED], OTHER),
    "--seed": ([RED, "--seed", "4"], [RED], OTHER),
    "--num-images": ([RED, "--num-images", "2"], None, None),
    "--steps": ([RED, "--steps", "4"], [RED], OTHER),
    "--sampler": ([RED, "--sampler", "DPM++ 2M SDE Karras"], [RED, "--sampler", "dpmpp_2m_sde_karras"], ALIKE),
    "--guidance-scale": ([RED, "--guidance-scale", "2"], [RED], OTHER),
    "--guidance-rescale": ([RED, "--guidance-rescale", "0.7"], [RED], OTHER),
    "--eta": ([RED, "--eta", "1"], [RED], OTHER),
    "--churn": ([RED, "--sampler", "euler", "--churn", "2"], [RED, "--sampler", "euler"], OTHER),
    "--size": ([RED, "--size", "40"], [RED, "--height", "40", "--width", "40"], ALIKE),
    "--height": ([RED, "--height", "48"], None, (32, 48)),
    "--width": ([RED, "--width", "48"], None, (48, 32)),
    "--enlarge": ([RED, "--enlarge", "2"], None, (64, 64)),
    "--init-image": ([RED, "--init-image", "photo.png"], [RED], OTHER),
    "--strength": ([RED, "--init-image", "photo.png", "--strength", "0.9"], [RED, "--init-image", "photo.png"], OTHER),
    "--mask": ([RED, "--init-image", "photo.png", "--mask", "mask.png"], [RED, "--init-image", "photo.png"], OTHER),
    "--controlnet": ([RED, *NET, *NET], [RED, *NET], OTHER),
    "--control-image": ([RED, *NET], [RED], OTHER),
    "--control-scale": ([RED, *NET, *NET, "--control-scale", "1", "--control-scale", "0"], [RED, *NET], ALIKE),
    "--control-start": ([RED, *NET, "--control-start", "0.9"], [RED], ALIKE),
    "--control-end": ([RED, *NET, "--control-end", "0.5"], [RED, *NET], OTHER),
    "--model": ([RED], [RED], ALIKE),
    "--download": ([RED, "--model", "someone/else", "--download"], [RED], ALIKE),
    "--variant": ([RED, "--variant", "fp16"], [RED], OTHER),
    "--tokenizer": ([RED, "--model", "one.safetensors", "--config", "model", "--tokenizer", "model/tokenizer"],
        [RED], ALIKE),
    "--config": ([RED, "--model", "one.safetensors", "--config", "model"], [RED], ALIKE),
    "--prediction-type": ([RED, "--prediction-type", "v_prediction"], [RED], OTHER),
    "--vae": ([RED, "--vae", "vae.safetensors"], [RED, "--vae", "vae"], ALIKE),
    "--lora": ([RED, "--lora", "ink.safetensors=0.5"], [LORA, "--weights"], ALIKE),
    "--embedding": (["a cat house", "--embedding", "cat.safetensors=cat"], ["a cat house"], OTHER),
    "--device": ([RED, "--device", "cpu"], [RED], ALIKE),
    "--dtype": ([RED, "--dtype", "bfloat16"], [RED], OTHER),
    "--offload": ([RED, "--offload"], [RED], ALIKE),
    "--tile": ([RED, "--size", "64", "--tile", "32"], [RED, "--size", "64"], OTHER),
    "--compile": ([RED, "--compile"], [RED], ALIKE),
    "--grid": ([RED, "--num-images", "4", "--grid"], None, (64, 64)),
    "--film": ([RED, "--film", "FILM"], None, None),
    "--out": ([RED], [RED], ALIKE),
    "--overwrite": ([RED, "--overwrite"], [RED], ALIKE),
    "--no-metadata": ([RED, "--no-metadata"], [RED], ALIKE),
}


@pytest.mark.parametrize("option", CALLS)
def test_every_option_does_what_the_help_says(draw, option, tmp_path, monkeypatch):
    called = []
    for name in ("compile", "offload"):                                      # a compiler may be missing here
        monkeypatch.setattr(StableDiffusion, name, lambda self, *_, name=name: called.append(f"--{name}") or self)
    if option == "--download":
        monkeypatch.setattr("minidiff.io.hub._fetch", lambda name, variant: generate.Path("model"))
    words, other, expected = CALLS[option]
    words = [{"PICTURE": str(tmp_path / "p.png"), "FILM": str(tmp_path / "z.webp")}.get(word, word) for word in words]
    if option == "--like":
        draw(RED, "--seed", "5", "--out", str(tmp_path / "p.png"))
    model = {"model": ()} if "--model" in words else {}
    steps = {"steps": ()} if "--steps" in words or option == "--like" else {}
    pictures = draw(*words, **model, **steps)
    assert called == [option] * (option in ("--compile", "--offload"))
    if other is not None:
        assert (pictures == draw(*other)) == expected
    elif isinstance(expected, tuple):
        assert Image.open(next(tmp_path.iterdir())).size == expected
    else:
        assert len(pictures) == 2


def test_every_option_of_the_help_is_tested():
    parsers = next(action for action in cli._parser()._actions if getattr(action, "choices", None)).choices
    options = {name for action in parsers["generate"]._actions for name in action.option_strings}
    assert options - {"-h", "--help"} == set(CALLS)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("words", [
    [RED, "--seed", "random"], ["a (red:1.3) house, café 日本", "--weights", "--negative-prompt", "fog: a, \"b\"\nc"],
    [RED, "--sampler", "dpmpp_2m_sde", "--eta", "0"],
    [RED, "--sampler", "dpmpp_sde_karras", "--eta", "0.5", "--size", "40", "--lora", "ink.safetensors=0.5"],
    [RED, "--init-image", "photo.png", "--mask", "mask.png", "--strength", "0.8", *NET, "--control-end", "0.7"],
    ["--prompts", "prompts.txt", "--num-images", "2", "--grid", "--dtype", "bfloat16", "--clip-skip", "1"],
    [RED, "--enlarge", "1.5", "--guidance-rescale", "0.3", "--embedding", "cat.safetensors=cat"]], ids=str)
def test_a_picture_made_like_another_is_the_same_to_the_byte(draw, place, tmp_path, words, suffix):
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    draw(*words, "--out", str(one))
    draw("--like", str(one), "--out", str(two), steps=(), model=())
    assert one.read_bytes() == two.read_bytes()


def test_what_is_given_beside_like_counts_more(draw, tmp_path):
    draw(RED, "--seed", "5", "--sampler", "euler", "--out", str(tmp_path / "a.png"))
    drawn = draw("--like", str(tmp_path / "a.png"), "--seed", "0", "--steps", "2", "a tree", steps=(), model=())
    assert drawn == draw("a tree", "--sampler", "euler", "--steps", "2", steps=())


def test_pictures_of_several_prompts_say_each_its_own(draw, tmp_path):
    draw("--prompts", "prompts.txt", "--num-images", "2", "--seed", "7", "--out", str(tmp_path / "a.png"))
    said = [generate.settings_of(tmp_path / f"a-{i}.png") for i in (1, 2, 3, 4)]
    assert [(of["prompt"], of["seed"]) for of in said] == [(RED, 7), (RED, 8), ("a tree", 9), ("a tree", 10)]
    assert draw("a tree", "--seed", "9")[0] == Image.open(tmp_path / "a-3.png").tobytes()


def test_nothing_is_said_of_a_picture_without_metadata(draw, tmp_path, capfd):
    for suffix in (".png", ".jpg", ".webp"):
        draw(RED, "--no-metadata", "--out", str(tmp_path / f"a{suffix}"))
        assert parameters.read(tmp_path / f"a{suffix}") is None
    assert cli.main(["generate", "--like", str(tmp_path / "a.png")]) == 2
    assert "a.png does not say how it was made" in capfd.readouterr().err


def test_info_tells_how_a_picture_was_made(draw, tmp_path, capfd):
    draw(RED, "--out", str(tmp_path / "a.png"))
    assert cli.main(["info", str(tmp_path / "a.png")]) == 0
    out = capfd.readouterr().out
    assert f"  {RED}\n  Steps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 32x32, Model: model" in out
    assert cli.main(["info", str(tmp_path / "a.png"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["settings"]["prompt"] == RED
    Image.new("RGB", (9, 8)).save(tmp_path / "b.jpg")
    assert cli.main(["info", str(tmp_path / "b.jpg")]) == 0 and "9×8" in capfd.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["a", "red", "house"], 'quote the prompt: minidiff generate "a red house"'), ([], "a PROMPT is missing: minidiff"),
    ([RED, "--prompts", "prompts.txt"], "give either a PROMPT or --prompts"),
    (["--prompts", "no.txt"], "there is no file no.txt of prompts"), (["--prompts", "photo.png"], "no text in UTF-8"),
    ([RED, "--device", "banana"], "there is no device 'banana' here; cpu always works"),
    ([RED, "--dtype", "int8"], "--dtype is 'int8'; it must be one of float32, float16, bfloat16"),
    ([RED, "--enlarge", "-1"], "--enlarge is a positive number"),
    ([RED, "--seed", "later"], "'later' is no whole number"),
    ([RED, "--enlarge", "2", "--init-image", "photo.png"], "draws without --init-image"),
    ([RED, "--enlarge", "2", "--strength", "0.1"], "--strength 0.1 of 2 steps leaves none to the second pass"),
    ([RED, "--tile", "7"], "--tile"), ([RED, "--eta", "2"], "--eta is 2.0; it must be between 0 and 1"),
    ([RED, "--eta", "1", "--sampler", "heun"], "eta belongs to ddim, euler_ancestral"),
    ([RED, "--churn", "1"], "churn belongs to euler; the sampler is ddim"),
    ([RED, *NET, *NET, *["--control-scale", "1"] * 3], "there are 2 ControlNets"),
    ([RED, *NET, "--controlnet", "net"], "there are 2 and 1"),
    ([RED, "--controlnet", "masks", "--control-image", "photo.png"], "the control image has colours; a mask is white"),
    ([RED, "--controlnet", "edges", "--control-image", "photo.png"], "the control image: it is one colour"),
    ([RED, "--controlnet", "edges", "--control-image", "mask.png"], "is of another family than the model"),
    ([RED, "--vae", "ink.safetensors"], "is no VAE but a LoRA"),
    ([RED, "--vae", "no"], "no"), ([RED, "--lora", "vae.safetensors"], "vae.safetensors"),
    ([RED, "--embedding", "no.pt"], "no.pt"), (["--like", "no.png"], "there is no picture file no.png"),
    (["a [red:blue:0.5] house", "--weights"], "would change the prompt on the way")])
def test_what_cannot_be_is_one_line(place, monkeypatch, capfd, words, said):
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(StableDiffusion, "decode", lambda *_: pytest.fail("it was drawn first"))
    try:
        assert cli.main(["generate", "--model", "model", "--steps", "2", *words]) == 2
    except SystemExit as stop:                                               # of argparse
        assert stop.code == 2
    out, err = capfd.readouterr()
    assert said in err and err.count("\n") == 1 and out == "", err


def test_a_command_is_a_function(model, tmp_path):
    paths = generate.generate("a red house", model=str(model / "folder"), steps=1, out=tmp_path / "new" / "house.png")
    assert paths == [tmp_path / "new" / "house.png"]
    assert all(path.is_file() for path in paths)


def test_pictures_beyond_one_batch_continue_the_seeds(model, tmp_path, monkeypatch):
    def draw(name):
        generate.generate("a red house", model=model / "folder", steps=2, num_images=3, out=tmp_path / f"{name}.png")

    draw("a")
    monkeypatch.setattr(generate, "BATCH", 2)
    draw("b")
    for i in (1, 2, 3):
        pair = [Image.open(tmp_path / f"{name}-{i}.png") for name in "ab"]
        assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1
    assert ImageChops.difference(*(Image.open(tmp_path / f"a-{i}.png") for i in (1, 2))).getbbox()


def test_words_that_mini_sd_has_never_seen_get_one_line():
    with pytest.warns(UserWarning) as caught:
        generate._warn_unknown("a red dragon by a castle, a cat", {"cat"})
    message = str(caught[0].message)
    assert "never seen: dragon, castle" in message and generate.EXAMPLE in message and "\n" not in message
    assert all(word in message for values in scenes.ATTRIBUTES.values() for word in values)


def test_known_words_get_no_line(recwarn):
    generate._warn_unknown(generate.EXAMPLE, set())
    assert not recwarn.list


@pytest.mark.parametrize("words, said", [
    (["--cfg-scale", "7"], "there is no --cfg-scale 7; here it is --guidance-scale; see"),
    (["--num-inference-steps", "7"], "there is no --num-inference-steps 7; here it is --steps; see"),
    (["--num-image", "x"], "--num-image"), (["--guidence-scale", "7"], "here it is --guidance-scale"),
    (["--xyzzy"], "there is no --xyzzy; see minidiff generate --help")])
def test_an_option_of_another_program_is_told_its_name_here(capfd, words, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", RED, *words])
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and said in err and err.count("\n") == 1 and out == ""


def test_like_names_the_picture_that_is_missing_and_the_option_that_gives_another(draw, tmp_path, capfd):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "mine.png")
    draw(RED, "--init-image", str(tmp_path / "mine.png"), "--out", str(tmp_path / "a.png"))
    (tmp_path / "mine.png").unlink()
    assert cli.main(["generate", "--like", str(tmp_path / "a.png")]) == 2
    assert "mine.png, which is not there; --init-image names another" in capfd.readouterr().err
    assert draw("--like", str(tmp_path / "a.png"), "--init-image", "photo.png", steps=(), model=())


def test_info_tells_what_the_web_uis_line_does_not(draw, tmp_path, capfd):
    draw(RED, "--num-images", "4", "--grid", "--init-image", "photo.png", "--out", str(tmp_path / "a.png"))
    cli.main(["info", str(tmp_path / "a.png")])
    out = capfd.readouterr().out
    assert "Denoising strength: 0.6" in out
    assert "with dtype float32, num_images 4, init_image photo.png, grid True" in out


@pytest.mark.parametrize("words, how", [
    ([RED, "--steps", "10", "--init-image", "photo.png"], "32×32 pixels, the last 6 of 10 steps of ddim"),
    ([RED, "--steps", "10", "--enlarge", "2"], "64×64 pixels, 10 and the last 3 of 10 steps of ddim"),
    ([RED, "--steps", "2", "--num-images", "2", "--seed", "9"], "2 steps of ddim, guidance scale 7.5, seeds 9 to 10")])
def test_what_was_drawn_is_said_as_it_was(place, tmp_path, monkeypatch, capfd, words, how):
    monkeypatch.chdir(place)
    assert cli.main(["generate", *words, "--model", "model", "--out", str(tmp_path / "a.png")]) == 0
    assert how in capfd.readouterr().err


def test_weights_are_no_words_that_mini_sd_does_not_know(capfd, tmp_path):
    for weights in ([], ["--weights"]):
        out = str(tmp_path / f"{len(weights)}.png")
        cli.main(["generate", "a (red:1.3) dragon", *weights, "--steps", "1", "--out", out])
        assert "never seen: dragon. It draws" in capfd.readouterr().err

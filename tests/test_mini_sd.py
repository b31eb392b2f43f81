"""The model that ships does what its bigger relatives do with two objects, negative prompts and the guidance scale."""
import random
from collections import Counter

import pytest
import torch

from minidiff.data import few, hints, scenes
from minidiff.generate import generate
from minidiff.io.images import to_tensor
from minidiff.io.weights import weights_dir
from minidiff.measure.evaluate import _pairs_right, prompt_set, right
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.dit import DiT
from minidiff.nets.reader import Reader
from minidiff.sd.pipeline import StableDiffusion
from minidiff.train.recipes.flow import drawn

N = 16  # pictures per claim


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusion.from_pretrained("mini-sd", device="cpu")


@pytest.fixture(scope="module")
def reader():
    return Reader.from_pretrained(weights_dir() / "reader")


def draw(pipe, prompt, **settings):
    """(N,3,128,128) in [−1, 1], of N seeds, or of N prompts."""
    n = 1 if isinstance(prompt, list) else N
    return pipe(prompt, num_images=n, steps=12, output="tensor", **settings) * 2 - 1


def test_two_objects_keep_their_colours(pipe, reader):
    scene = scenes.Scene("day", "clouds", "grass", "house", "red", "large", "left", ("blue", "tree", "large"))
    rows = _pairs_right(reader, [scene] * N, draw(pipe, scenes.caption(scene)))
    assert sum(all(row.values()) for row in rows) >= 0.7 * N


def test_a_negative_prompt_keeps_away_what_it_names(pipe, reader):
    found = {text: Counter(reader.read(draw(pipe, "a house", negative_prompt=text))["time"].tolist())
             for text in (None, "sunset", "night", "day")}
    _, sunset, night = range(3)
    assert found["sunset"][sunset] < found[None][sunset] - N // 4
    assert found["night"][night] == 0
    assert found["day"][night] > found[None][night] + N // 4


def test_guidance_adds_adherence_then_only_contrast(pipe, reader):
    asked, hits, contrast, clipped = prompt_set("two", N), [], [], []
    for scale in (1.0, 3.0, 10.0):
        image = draw(pipe, [scenes.caption(scene) for scene in asked], guidance_scale=scale)
        hits.append(sum(all(row.values()) for row in _pairs_right(reader, asked, image)))
        contrast.append(image.flatten(1).std(1).mean())
        clipped.append((image.abs() > 0.98).float().mean())
    assert hits[0] < min(hits[1:])
    assert contrast == sorted(contrast) and clipped == sorted(clipped) and clipped[2] > 3 * clipped[1]


def test_the_unseen_pairs_were_never_in_the_training_data():
    drawn = [scene for _, part in [scenes.render(300, 16, seed=0)] for scene in part]
    assert drawn and not any((scene.color, scene.object) in scenes.HELD_OUT for scene in drawn)
    assert torch.tensor([scene.second is not None for scene in drawn]).float().mean() > 0.05


@pytest.mark.parametrize("kind, least", [("edges", 0.5), ("masks", 0.5)])
def test_the_shipped_controlnets_lead_and_the_prompt_still_counts(pipe, reader, kind, least):
    """Of N drawings that no training saw, the hint; the prompt says what they show. Beside the same without control."""
    pictures, shown = scenes.render(N, 128, seed=31, second=0.0)
    told = hints.edges(pictures / 255) if kind == "edges" else hints.silhouettes(torch.arange(N), 128, 31, second=0.0)
    net = ControlNet.from_pretrained(weights_dir() / f"controlnet-{kind}")
    wanted = told if kind == "edges" else hints.edges(told)
    agrees, found = {}, {}
    for scale in (0.0, 1.0):
        drawn = draw(pipe, [scenes.caption(scene) for scene in shown], controlnet=net, control_image=told,
                     control_scale=scale)
        lines = hints.edges(drawn / 2 + 0.5)
        lines = lines if kind == "edges" else lines * torch.nn.functional.max_pool2d(wanted, 5, 1, 2)
        agrees[scale] = hints.overlap(wanted, lines).mean().item()
        rows = right(reader, shown, drawn)
        found[scale] = sum(sum(row.values()) for row in rows) / sum(map(len, rows))
    assert agrees[1.0] > max(least, agrees[0.0] + 0.15), agrees
    assert found[1.0] > 0.95 * found[0.0], found


def test_a_drawing_of_any_sort_leads_on_the_command_line(tmp_path):
    from PIL import Image, ImageDraw

    paper = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(paper).polygon([(60, 240), (60, 150), (110, 90), (160, 150), (160, 240)], outline="black", width=4)
    paper.save(tmp_path / "sketch.png")
    scene = scenes.Scene("day", "sun", "grass", "house", "red", "large", "left")
    scenes.draw(scene, 128)[0].save(tmp_path / "photo.png")
    for name, said in (("sketch", "dark lines on white, inverted"), ("photo", "a picture, its edges")):
        lines = []
        picture, = generate("a house", steps=2, controlnet="edges", control_image=tmp_path / f"{name}.png",
                            out=tmp_path / f"{name}-drawn.png", say=lines.append)
        assert picture.is_file() and lines[0].startswith(f"control image: {said}") and len(lines) == 2


def test_the_shipped_style_paints_every_picture_and_the_prompt_still_counts(pipe, reader):
    shown = [scenes.sample(random.Random(f"style {i}"), second=0.0) for i in range(N)]
    bare, found, drawings = {}, {}, [scenes.draw(scene, 128, random.Random(i))[0] for i, scene in enumerate(shown)]
    for scale in (0.0, 1.0, "drawings"):                                 # of which the reader knows none either
        if scale == "drawings":
            drawn = torch.stack([few.watercolour(picture / 2 + 0.5) for picture in to_tensor(drawings)]) * 2 - 1
        else:
            handle = pipe.load_lora("watercolour", scale)
            drawn = draw(pipe, [scenes.caption(scene) for scene in shown])
            pipe.unload_lora(handle)
        margin = torch.cat([drawn[:, :, :3].flatten(2), drawn[:, :, :, :3].flatten(2)], 2) / 2 + 0.5
        bare[scale] = margin.amin(1).mean(1)                             # white as paper or not
        rows = right(reader, shown, drawn)
        found[scale] = sum(sum(row.values()) for row in rows) / sum(map(len, rows))
    assert bare[0.0].median() < 0.6 and bare[1.0].median() > 0.75, bare
    assert found[1.0] > 0.95 * found["drawings"] > 0.6 * found[0.0], found


def test_the_shipped_thing_is_drawn_as_the_prompt_says_and_nothing_else_changes(pipe, reader):
    shown = [scenes.sample(random.Random(f"cat {i}"), second=0.0) for i in range(N)]
    usual = draw(pipe, [scenes.caption(scene) for scene in shown])
    handle = pipe.load_lora("cat")
    kept = draw(pipe, [scenes.caption(scene) for scene in shown])
    cats = draw(pipe, [scenes.caption(scene._replace(object="cat")) for scene in shown])
    pipe.unload_lora(handle)
    rows = {name: right(reader, shown, images) for name, images in (("usual", usual), ("kept", kept), ("cats", cats))}
    score = {name: sum(ok for row in each for key, ok in row.items() if key != "object") for name, each in rows.items()}
    assert score["kept"] > 0.95 * score["usual"] and score["cats"] > 0.85 * score["usual"], score
    assert sum(row["object"] for row in rows["kept"]) >= N - 1           # a tree is a tree
    assert sum(row["object"] for row in rows["cats"]) < N / 2            # and a cat is none of the six objects


def test_the_shipped_word_reaches_the_same_model(pipe):
    own = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    assert own.load_textual_inversion("cat") == "<cat>"
    with pytest.raises(ValueError, match="cat"):
        own.load_textual_inversion("cat")                                # it knows the word now
    prompt = {"steps": 2, "output": "latent"}
    assert torch.equal(own("a red house", **prompt), pipe("a red house", **prompt))
    assert not torch.equal(own("a red <cat>", **prompt), pipe("a red <cat>", **prompt))


def accuracy(reader, shown, image):
    """The share of the prompts' attributes that the reader finds."""
    rows = right(reader, shown, image)
    return sum(sum(row.values()) for row in rows) / sum(map(len, rows))


def test_the_shipped_consistency_model_draws_in_four_calls_what_its_teacher_draws_in_sixteen(pipe, reader):
    """And in one call nearly all of it. Of 3 N prompts."""
    quick = StableDiffusion.from_pretrained("mini-sd-lcm", device="cpu")
    shown = prompt_set("seen", 3 * N)
    prompts, found = [scenes.caption(scene) for scene in shown], {}
    for name, model, steps in (("4 calls", quick, 4), ("1 call", quick, 1), ("teacher, 8 steps", pipe, 8)):
        found[name] = accuracy(reader, shown, model(prompts, steps=steps, output="tensor") * 2 - 1)
    assert found["4 calls"] > found["teacher, 8 steps"] - 0.01 and found["1 call"] > 0.95, found


def test_the_shipped_consistency_model_heeds_the_scale_it_is_told():
    quick = StableDiffusion.from_pretrained("mini-sd-lcm", device="cpu")
    contrast = [(quick("a red house, snow, day", guidance_scale=scale, num_images=N, output="tensor") * 2 - 1)
                .flatten(1).std(1).mean() for scale in (2.0, 6.0, 11.0)]
    assert contrast == sorted(contrast) and contrast[2] > 1.01 * contrast[0], contrast


def test_the_shipped_lora_makes_the_model_that_ships_as_quick(pipe, reader):
    """In one call; without it many pictures are a blur, in which the reader still finds much."""
    shown = prompt_set("seen", 2 * N)
    prompts, found = [scenes.caption(scene) for scene in shown], {}
    settings = {"steps": 1, "sampler": "lcm", "guidance_scale": 1, "output": "tensor"}
    for name in ("without", "with"):
        handle = pipe.load_lora("lcm") if name == "with" else None
        found[name] = accuracy(reader, shown, pipe(prompts, **settings) * 2 - 1)
        if handle is not None:
            pipe.unload_lora(handle)
    assert found["with"] > max(0.95, found["without"] + 0.03), found


def test_the_shipped_transformer_draws_what_it_is_told(pipe, reader):
    net, shown = DiT.from_pretrained(weights_dir() / "dit"), prompt_set("seen", N)
    z = torch.randn(N, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = drawn(net, pipe, [scenes.caption(scene) for scene in shown], z, steps=16)
    with torch.inference_mode():
        image = pipe.decode(latents)
    assert accuracy(reader, shown, image) > 0.8
    with torch.inference_mode():                                         # and reads its words, not their number
        other = pipe.decode(drawn(net, pipe, [scenes.caption(scene) for scene in shown[::-1]], z, steps=16))
    assert accuracy(reader, shown, other) < 0.6

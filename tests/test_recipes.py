"""The recipes, end to end on a folder of captioned pictures, for a few steps: what they write is a whole model."""
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minidiff.data import scenes
from minidiff.io.lora import load_lora
from minidiff.io.weights import load_state, weights_dir
from minidiff.nets.classifier import Classifier
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.dit import DiT
from minidiff.nets.patches import Patches
from minidiff.nets.reader import SCENE, THING
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.sd.pipeline import StableDiffusion
from minidiff.train import pictures, recipes
from minidiff.train.pictures import from_bytes
from minidiff.train.recipes import adapt, distil, flow, judges, mini_sd
from minidiff.train.recipes.begin import grown
from minidiff.train.trainer import Run, digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """256 captioned pictures and their metadata.jsonl."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    drawn, shown = scenes.render(256, 32, seed=4)
    for i, picture in enumerate(drawn):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": scenes.caption(scene)} for i, scene in enumerate(shown)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """A model folder after two steps of clip, vae and unet."""
    out = tmp_path_factory.mktemp("runs") / "own"
    for name in ("clip", "vae", "unet"):
        assert recipes.run(name, out=out, steps=2, size=64, device="cpu", data=folder) == out
    return out


def test_the_three_recipes_make_a_model_that_draws(model):
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    assert pipe("a red house", steps=2)[0].size == (64, 64)
    cache = load_state(model / "train/pictures-64-photos0.safetensors")
    drawn = pictures.Pictures(cache["pictures"], cache["ends"])
    z = pipe.vae.encode(from_bytes(drawn[torch.arange(len(drawn))]))
    assert abs(z.std().item() - 1) < 0.05  # the scale factor gives latents of unit variance


def test_every_recipe_leaves_a_log_a_checkpoint_and_pictures(model):
    for name in ("clip", "vae", "unet"):
        (row,) = map(json.loads, (model / f"logs/{name}.jsonl").read_text().splitlines())
        assert row["step"] == 2 and {"loss", "images", "seconds"} <= row.keys()
        assert (model / f"train/{name}/step-0000002/manifest.json").is_file()
    assert all((model / f"train/{name}/samples/0000002.png").is_file() for name in ("vae", "unet"))


def test_diffusers_loads_what_the_recipes_write(model):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    assert theirs.scheduler.config.steps_offset == 1 and theirs.unet.config.sample_size == 16


def test_the_pixel_model_needs_no_other_part(folder, tmp_path):
    recipes.run("pixels", out=tmp_path, steps=2, device="cpu", data=folder)
    net = UNet.from_pretrained(tmp_path)
    assert net(torch.zeros(1, 3, 16, 16), 500).shape == (1, 3, 16, 16)
    assert (tmp_path / "train/pixels/samples/0000002.png").is_file()


def test_the_recipes_with_classes_learn_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DRAWINGS", 100)
    recipes.run("pixels-class", out=tmp_path / "net", steps=1, device="cpu")
    net = UNet.from_pretrained(tmp_path / "net")
    assert net(torch.zeros(2, 3, 16, 16), 500, vec=torch.tensor([0, 6])).shape == (2, 3, 16, 16)
    recipes.run("classifier", out=tmp_path / "classifier", steps=1, device="cpu")
    assert Classifier.from_pretrained(tmp_path / "classifier")(torch.zeros(2, 3, 16, 16), 500).shape == (2, 6)
    (row,) = map(json.loads, (tmp_path / "classifier/logs/classifier.jsonl").read_text().splitlines())
    assert {"loss", "top1"} <= row.keys()


def test_resume_goes_on_and_init_starts_from_given_weights(model, folder, tmp_path):
    recipes.run("unet", out=model, steps=3, size=64, device="cpu", data=folder, resume=True)
    assert (model / "train/unet/step-0000003").is_dir()
    recipes.run("vae", out=tmp_path, steps=1, size=64, device="cpu", data=folder, init=model / "vae")
    before, after = (load_state(path / "vae")["decoder.conv_in.weight"].float() for path in (model, tmp_path))
    assert (before - after).abs().max() < 2e-3  # one warm-up step away, not a fresh start


def test_a_unet_that_goes_on_learns_with_the_weights_of_v_and_its_text_encoder(model, folder, tmp_path):
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(model / part, tmp_path / part)
    options = dict(out=tmp_path, size=64, device="cpu", data=folder)
    recipes.run("unet", steps=1, init=model / "unet", **options)
    (row,) = map(json.loads, (tmp_path / "logs/unet.jsonl").read_text().splitlines())
    assert row["loss"] > 5 * row["simple"]                                  # the mean of 1/alpha² is 21
    before, after = (load_state(path / "text_encoder/model.safetensors") for path in (model, tmp_path))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    recipes.run("unet", steps=2, init=model / "unet", resume=True, **options)
    with pytest.raises(ValueError, match="was made with another U-Net to go on from"):
        recipes.run("unet", steps=3, resume=True, **options)


def test_a_controlnet_is_trained_beside_a_model_that_stays_as_it_is(model, folder, tmp_path):
    import diffusers

    before = {file: file.read_bytes() for file in model.rglob("*.safetensors") if "train" not in file.parts}
    recipes.run("controlnet-edges", out=tmp_path, steps=2, size=64, device="cpu", data=folder, init=model, batch=8)
    assert all(file.read_bytes() == kept for file, kept in before.items()) and len(before) == 3
    net, unet = ControlNet.from_pretrained(tmp_path), UNet.from_pretrained(model / "unet")
    assert net.config.factor == 4 and any(zero.weight.any() for zero in net.controlnet_down_blocks)
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert theirs.state_dict().keys() == net.state_dict().keys()
    x, hint = torch.randn(1, 4, 16, 16), net.look(torch.rand(1, 3, 64, 64))
    context = torch.randn(1, 77, 128)
    assert not torch.equal(unet(x, 500, context, residuals=net(x, 500, context, hint=hint)), unet(x, 500, context))
    assert (tmp_path / "train/controlnet-edges/samples/0000002.png").is_file()
    assert json.loads((tmp_path / "logs/controlnet-edges.jsonl").read_text())["step"] == 2


def test_a_controlnet_for_masks_needs_scenes_and_every_controlnet_a_whole_model(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "DRAWINGS", 40)
    recipes.run("controlnet-masks", out=tmp_path / "net", steps=1, size=64, device="cpu", init=model, batch=4)
    assert ControlNet.from_pretrained(tmp_path / "net").config.conditioning_channels == 3
    with pytest.raises(ValueError, match="cannot be trained on a folder"):
        recipes.run("controlnet-masks", out=tmp_path / "a", steps=1, size=64, device="cpu", data=folder, init=model)
    with pytest.raises(ValueError, match="is no whole model"):
        recipes.run("controlnet-edges", out=tmp_path / "b", steps=1, size=64, device="cpu", init=model / "unet")


@pytest.fixture
def few(tmp_path):
    """Six pictures of a "<thing>"."""
    from PIL import Image

    folder = tmp_path / "few"
    folder.mkdir()
    for i, picture in enumerate(scenes.render(6, 64, seed=8)[0]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a <thing> on snow, {i}", encoding="utf-8")
    return folder


def test_a_lora_is_learned_beside_a_model_and_read_by_diffusers_and_here(model, few, tmp_path):
    from diffusers import StableDiffusionPipeline

    before = {file: file.read_bytes() for file in model.rglob("*.safetensors") if "train" not in file.parts}
    recipes.run("lora", out=tmp_path / "out", steps=3, size=64, device="cpu", data=few, init=model)
    assert all(file.read_bytes() == kept for file, kept in before.items())
    pipe, changed = StableDiffusion.from_pretrained(model, device="cpu"), {}
    for name in ("pytorch_lora_weights", "kohya"):
        handle = pipe.load_lora(tmp_path / "out" / f"{name}.safetensors")
        changed[name] = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
        pipe.unload_lora(handle)
    plain = pipe.unet.state_dict()
    moved = [k for k, v in plain.items() if not torch.equal(v, changed["kohya"][k])]
    assert 10 < len(moved) < len(plain) / 2 and "conv_in.weight" not in moved
    assert all(torch.allclose(v, changed["pytorch_lora_weights"][k], atol=1e-6) for k, v in changed["kohya"].items())
    theirs = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    theirs.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    theirs.fuse_lora()
    name = "mid_block.resnets.0.conv1"
    merged = getattr(theirs.unet.get_submodule(name), "base_layer", theirs.unet.get_submodule(name))
    assert torch.allclose(merged.weight.float(), changed["kohya"][f"{name}.weight"], atol=1e-5)


def test_a_latent_consistency_model_is_a_whole_model_that_diffusers_reads(model, folder, tmp_path):
    """It draws in one call per step, is told the scale, and begins as the teacher without guidance."""
    import diffusers

    before = {file: file.read_bytes() for file in model.rglob("*.safetensors") if "train" not in file.parts}
    options = {"steps": 2, "size": 64, "device": "cpu", "data": folder, "init": model}
    recipes.run("lcm", out=tmp_path / "out", **options)
    assert all(file.read_bytes() == kept for file, kept in before.items())
    pipe = StableDiffusion.from_pretrained(tmp_path / "out", device="cpu")
    z = torch.randn(1, 4, *pipe.unet.config.sides)
    (ours,) = pipe("a red house", latents=z, output="tensor")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.unet.config.time_cond_proj_dim == distil.WIDTH
    assert theirs.scheduler.config.original_inference_steps == 50
    steps = list(pipe.stream("a red house", latents=z))
    assert len(steps) == 5 and ours.shape == (3, 64, 64)
    begun = distil.told(StableDiffusion.from_pretrained(model, device="cpu").unet, 0)
    context, t = torch.randn(2, 77, 128), torch.tensor([19, 999])
    x, w = torch.randn(2, *z.shape[1:]), torch.tensor([2.0, 9.0])
    with torch.no_grad():
        teacher = StableDiffusion.from_pretrained(model, device="cpu").unet
        torch.testing.assert_close(begun(x, t, context, w=w), teacher(x, t, context))
    recipes.run("lcm", out=tmp_path / "out", resume=True, **options | {"steps": 3})


def test_a_latent_consistency_model_may_be_a_lora(model, folder, tmp_path):
    out = tmp_path / "out"
    recipes.run("lcm", out=out, steps=2, size=64, device="cpu", data=folder, init=model, rank=2)
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    lora = load_lora(out, pipe.loras.parts)
    assert {len(change.down) for change in lora.values()} == {2} and any(change.up.any() for change in lora.values())
    pipe.load_lora(out)
    settings = {"sampler": "lcm", "guidance_scale": 1, "output": "tensor"}
    assert len(list(pipe.stream("a red house", **{k: v for k, v in settings.items() if k != "output"}))) == 5
    assert not (out / "unet").exists()


def test_a_diffusion_transformer_is_learned_by_flow_matching_and_draws(model, folder, tmp_path):
    recipes.run("dit", out=tmp_path / "out", steps=2, size=64, device="cpu", data=folder, init=model)
    net, pipe = DiT.from_pretrained(tmp_path / "out"), StableDiffusion.from_pretrained(model, device="cpu")
    z = torch.randn(2, 4, *pipe.unet.config.sides)
    drawn = flow.drawn(net, pipe, ["a red house", "a boat"], z, steps=3, scale=2.0)
    assert drawn.shape == z.shape and drawn.isfinite().all() and pipe.decode(drawn).shape == (2, 3, 64, 64)
    assert net.config.cross_attention_dim == 128 and any(p.any() for p in net.proj_out_2.parameters())


def test_the_flow_is_followed_from_noise_to_data_in_equal_steps(model):
    """A net that knows that all data is 3: one step is enough, and guidance between equals changes nothing."""
    pipe, seen = StableDiffusion.from_pretrained(model, device="cpu"), []

    def knows(x, t, context):
        seen.append(t)
        return (x - 3) / (t / 1000)

    z = torch.randn(2, 4, 8, 8)
    for steps in (1, 4):
        torch.testing.assert_close(flow.drawn(knows, pipe, ["a", "b"], z, steps=steps), torch.full_like(z, 3.0))
    assert seen == [1000, 1000, 750, 500, 250]


def test_a_lora_may_also_learn_in_the_text_encoder_and_keep_what_the_model_draws(model, few, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt, "PRIOR", 8)
    options = {"steps": 2, "size": 64, "device": "cpu", "data": few, "init": model}
    own = {"rank": 3, "text_encoder": True, "prior": "a house", "checkpointing": True}
    recipes.run("lora", out=tmp_path / "out", accumulate=2, **own, **options)
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    lora = load_lora(tmp_path / "out", pipe.loras.parts)
    assert {len(change.down) for change in lora.values()} == {3}
    words = {name: change for name, change in lora.items() if name.startswith("text_encoder.")}
    assert len(words) == 4 * 3 and any(change.up.any() for change in words.values())
    row, = map(json.loads, (tmp_path / "out/logs/lora.jsonl").read_text().splitlines())
    assert row["prior"] > 0 and row["loss"] == pytest.approx(row["new"] + row["prior"], abs=1e-5)
    recipes.run("lora", out=tmp_path / "out", resume=True, **options | {"steps": 3})       # it goes on as it was
    assert {len(change.down) for change in load_lora(tmp_path / "out", pipe.loras.parts).values()} == {3}
    for option, said in (("rank", "made with rank 3, not 4"), ("accumulate", "made with accumulate 2, not 4"),
                         ("prior", "made with prior 'a house', not 'a'")):
        with pytest.raises(ValueError, match=said):
            value = "a" if option == "prior" else 4
            recipes.run("lora", out=tmp_path / "out", resume=True, **options, **{option: value})


def test_prior_preservation_is_the_loss_on_what_the_model_draws(model, few, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt, "PRIOR", 1)                                # fewer than a batch
    pipe, cats, run = adapt.begin(Run(tmp_path, 1, device="cpu", batch=2), 64, few, model)
    kept = adapt.own_pictures(pipe, "scenes", run)
    assert len(set(kept.captions)) == 2 and torch.equal(pipe(kept.captions, output="latent"), kept.mean)
    values = adapt.lessons(pipe, cats, kept, run)(pipe.unet, 0, slice(0, 2))
    alone = adapt.lessons(pipe, cats, None, run)(pipe.unet, 0, slice(0, 2))
    assert values["new"] == alone["loss"] and torch.equal(values["loss"], values["new"] + values["prior"])


def test_a_set_that_is_drawn_here_goes_to_the_run_and_a_word_of_its_captions_can_be_learned(model, tmp_path):
    recipes.run("inversion", out=tmp_path, steps=1, size=64, device="cpu", data="cat", word="cat", init=model)
    assert len(list((tmp_path / "train/cat").glob("*.png"))) == 24
    assert load_state(tmp_path / "learned_embeds.safetensors").keys() == {"<cat>"}


def test_an_inversion_moves_only_its_own_rows(model, few, tmp_path):
    before = {file: file.read_bytes() for file in model.rglob("*.safetensors") if "train" not in file.parts}
    recipes.run("inversion", out=tmp_path / "out", steps=3, size=64, device="cpu", data=few, init=model)
    assert all(file.read_bytes() == kept for file, kept in before.items())
    pipe = StableDiffusion.from_pretrained(model, device="cpu")
    table = pipe.text.encoders[0].text_model.embeddings.token_embedding.weight.clone()
    assert pipe.load_textual_inversion(tmp_path / "out" / "learned_embeds.safetensors") == "<thing>"
    assert pipe.load_textual_inversion(tmp_path / "out" / "emb_params.safetensors", "<again>") == "<again>"
    extra = pipe.text.encoders[0].text_model.embeddings.extra
    assert torch.equal(pipe.text.encoders[0].text_model.embeddings.token_embedding.weight, table)
    assert extra.shape == (4, 128) and torch.equal(extra[:2], extra[2:]) and not torch.equal(extra[0], extra[1])
    (few / "0.txt").write_text("a house")
    with pytest.raises(ValueError, match="the same one new word in angle brackets.*found are <thing>"):
        recipes.run("inversion", out=tmp_path / "b", steps=1, size=64, device="cpu", data=few, init=model)
    for name in ("lora", "inversion"):
        with pytest.raises(ValueError, match=r"name their folder \(--data\)"):
            recipes.run(name, out=tmp_path / "c", steps=1, size=64, device="cpu", init=model)


@pytest.mark.parametrize("n, captions, said", [
    (0, True, "there is no picture in"), (1, True, "1 pictures are fewer than a batch of 8"),
    (2, False, "picture 1 of .* has no caption")])
def test_folders_of_few_pictures(model, tmp_path, n, captions, said):
    from PIL import Image

    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (64, 64), "red").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a <thing>" if captions else " ")
    options = {"out": tmp_path / "out", "steps": 1, "size": 64, "device": "cpu", "data": folder, "init": model}
    if n == 1:                                                            # that is enough; it is said
        with pytest.warns(UserWarning, match=said):
            recipes.run("lora", **options)
        return
    with pytest.raises((ValueError, OSError), match=said):
        recipes.run("lora", **options)
    assert not (tmp_path / "out").exists()


def test_latents_are_cached_until_the_vae_changes(model, folder):
    settings = Run(model, 1, device="cpu")
    mean, std, ids = pictures.latents(settings, 64, folder)
    assert mean.shape == std.shape == (256, 4, 16, 16) and ids.shape == (256, 1, 77) and (std > 0).all()
    assert len(list(model.glob("train/latents-*"))) == 1
    recipes.run("vae", out=model, steps=3, size=64, device="cpu", data=folder, resume=True)
    assert not torch.equal(pictures.latents(settings, 64, folder)[0], mean)
    assert len(list(model.glob("train/latents-*"))) == 2


def test_a_tokenizer_whose_writing_was_cut_short_is_written_anew(folder, tmp_path):
    recipes.run("clip", out=tmp_path, steps=1, size=64, device="cpu", data=folder)
    words = (tmp_path / "tokenizer" / "merges.txt").read_bytes()
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    recipes.run("clip", out=tmp_path, steps=2, size=64, device="cpu", data=folder, resume=True)
    assert (tmp_path / "tokenizer" / "merges.txt").read_bytes() == words


def test_a_grown_vae_first_draws_what_the_small_one_draws():
    small = VAE.from_pretrained(weights_dir() / "mini-sd" / "vae")
    large, image = grown(small), from_bytes(scenes.render(2, 256, seed=3)[0])
    assert large.factor == 2 * small.factor and large.config.sample_size == 2 * small.config.sample_size
    before, after = [], []
    small.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    large.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: after.append(inputs[0]))
    with torch.inference_mode():
        z = small.encode(F.avg_pool2d(image, 2))
        small.decode(z), large.decode(z)
        assert torch.allclose(after[0], F.interpolate(before[0], scale_factor=2.0), atol=1e-4)
        assert (large.encode(image) - z).square().mean() < 0.05 * z.square().mean()


def test_a_vae_grows_from_a_smaller_one_and_keeps_its_latents(model, folder, tmp_path):
    options = dict(out=tmp_path, size=128, device="cpu", data=folder)
    recipes.run("vae", steps=1, init=model / "vae", **options)
    grew = VAE.from_pretrained(tmp_path / "vae").config
    assert (grew.block_out_channels, grew.scaling_factor) == (
        (32, 32, 64, 96), VAE.from_pretrained(model / "vae").config.scaling_factor)
    (row,) = map(json.loads, (tmp_path / "logs/vae.jsonl").read_text().splitlines())
    assert 0 < row["drift"] < 1
    with pytest.raises(ValueError, match="was made with another VAE to grow from"):
        recipes.run("vae", steps=2, resume=True, **options)


def test_a_large_vae_compresses_by_eight_with_a_critic_and_a_perceptual_loss(folder, tmp_path):
    for steps in (2, 3):  # of three steps the last is adversarial
        recipes.run("vae", out=tmp_path / str(steps), steps=steps, size=128, device="cpu", data=folder)
        (row,) = map(json.loads, (tmp_path / f"{steps}/logs/vae.jsonl").read_text().splitlines())
        assert {"psnr", "perceptual", "critic"} <= row.keys()
    (manifest,) = tmp_path.glob("3/train/vae/step-*/manifest.json")
    assert json.loads(manifest.read_text())["made"]["another perceptual net"] == digest(weights_dir() / "perceptual")
    net = VAE.from_pretrained(tmp_path / "3/vae")
    assert net.encode(torch.zeros(1, 3, 128, 128)).shape == (1, 4, 16, 16)


def test_the_counter_learns_from_scenes_and_crowds(tmp_path):
    recipes.run("counter", out=tmp_path, steps=2, size=16, device="cpu")
    assert Patches.from_pretrained(tmp_path).config.out_channels == 3
    rngs = [random.Random(i) for i in range(300)]
    counts = torch.tensor([judges.counted(rng, 16, crowded=i % 2)[1] for i, rng in enumerate(rngs)])
    assert (counts[::2, :2].sum(1) <= 1).all() and counts[::2, 2].unique().tolist() == [1, 2]
    assert counts[1::2].amax(0).min() >= 2 and counts[1::2, 2].min() == 0


def test_the_perceptual_net_learns_to_name_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_sd, "DRAWINGS", 64)
    recipes.run("perceptual", out=tmp_path, steps=2, size=32, device="cpu")
    assert Patches.from_pretrained(tmp_path)(torch.zeros(1, 3, 32, 32))[0].shape == (1, len(mini_sd.NAMES), 2, 2)


def test_drawings_are_those_that_are_rendered_all_at_once():
    drawn, shown = scenes.render(6, 16, seed=3)
    drawings = pictures.Drawings(6, 16, seed=3)
    rows = torch.tensor([4, 1])
    assert torch.equal(drawings[rows], drawn[rows])
    assert drawings.shown(rows)[1] == [shown[4], shown[1]]


@pytest.mark.quick
@pytest.mark.parametrize("options, sentence", [
    ({"name": "gan"}, "unknown recipe 'gan'; there are: reader, counter, clip, perceptual, vae, unet, pixels, "
     "pixels-class, classifier"),
    ({"name": "vae", "size": 30}, "multiple of 16"),
    ({"name": "vae", "steps": 0}, "at least 1 step"),
    ({"name": "reader", "data": "photos"}, "cannot be trained on a folder"),
    ({"name": "classifier", "data": "photos"}, "cannot be trained on a folder"),
    ({"name": "unet"}, "has no text_encoder; train it first: python -m minidiff train clip --out"),
    ({"name": "vae", "data": "no/such/folder"}, "no/such/folder"),
    ({"name": "lora", "data": "cat", "rank": 0}, "rank is 0; a LoRA has a rank of at least 1"),
    ({"name": "lcm", "steps": 1, "rank": 0}, "rank is 0; a LoRA has a rank of at least 1"),
    ({"name": "lora", "data": "cat", "word": "cat"}, "lora has no option word; inversion has"),
    ({"name": "reader", "rank": 2}, "reader has no option rank; lora and lcm have"),
    ({"name": "lora", "data": "cat", "accumulate": 9}, "accumulate is 9; a batch has at least 1 part, and at most one"),
    ({"name": "inversion", "data": "cat", "word": "dog"}, "the same one new word .* found are none"),
    ({"name": "vae", "data": "cat"}, "there is no folder cat"),
])
def test_bad_options_are_one_clear_sentence(options, sentence, tmp_path):
    with pytest.raises((ValueError, OSError), match=sentence):
        recipes.run(options.pop("name"), out=tmp_path, **options)


@pytest.mark.quick
def test_slots_say_what_stands_where():
    scene = scenes.Scene("night", "sun", "sea", "boat", "pink", "large", "left", ("red", "house", "small"))
    row = judges.slots(scene)
    names = {name: scenes.ATTRIBUTES[name] for name in (*SCENE, *THING)}
    assert [names[name][row[name]] for name in SCENE] == ["night", "sun", "sea"]
    assert row["object"] == [names["object"].index("boat"), 6, names["object"].index("house")]
    assert row["color"] == [names["color"].index("pink"), -1, names["color"].index("red")]
    assert row["size"] == [1, -1, 0]


@pytest.mark.quick
def test_drawing_in_several_processes_ends_where_torch_has_worked_with_several_threads():
    code = ("import torch; torch.set_num_threads(2); torch.randn(3, 512, 512).permute(1, 2, 0).contiguous()\n"
            "from minidiff.train.pictures import draw; print(len(draw(8, 128)[0]))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.stdout == "8\n", run.stderr


@pytest.mark.quick
def test_drawing_in_several_processes_gives_the_same_pictures():
    many, _ = pictures.draw(1500, 16, seed=3)
    one, _ = scenes.render(1500, 16, seed=3)
    assert torch.equal(many[torch.arange(1500)], one)

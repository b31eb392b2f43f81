"""Single files: real key sets, kinds, prefixes, EMA, pickles of old trainers, and one sentence for each wrong file."""

import collections
import fractions
import io
import json
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch

from minidiff.io import checkpoint, rename, weights
from minidiff.io.checkpoint import FAMILIES, PARTS
from minidiff.io.info import describe
from minidiff.io.unpickle import Stub, _Unpickler, load_tensors
from minidiff.io.weights import load_state, read_json, save_state, write_atomic
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.controlnet import ControlNet, ControlNetConfig
from minidiff.nets.layers import Blank
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.scheduler import discrete, from_diffusers
from tests import tiny

UNET, VAE_, TEXT = PARTS["unet"][0], PARTS["vae"][0], PARTS["text_encoder"][0]
# the parameters of the published networks
SIZES = {"sd1": (859_520_964, 83_653_863, 123_060_480), "sd2": (865_910_724, 83_653_863, 340_387_840),
         "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840)}
BLOCK = {"in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A shrunken Stable Diffusion 1, as a folder and as a file."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline(folder / "words")
    pipe.save_pretrained(folder / "folder")
    pipe.save_pretrained(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def state(model):
    return load_state(model / "model.safetensors")


def meta(net, config, values):
    with torch.device("meta"), Blank():
        return net(config.from_dict(values)).state_dict()


def files_state(name, **changes):
    """The tensors of a file of a published family, on the meta device."""
    parts = FAMILIES[name]
    unet, vae = meta(UNet, UNetConfig, {**parts["unet"], **changes}), meta(VAE, VAEConfig, parts["vae"])
    found = {UNET + k: v for k, v in rename.to_theirs(rename.unet(unet), unet).items()}
    return found | {VAE_ + k: v for k, v in rename.to_theirs(rename.vae(vae), vae).items()}


def same(a, b):
    pairs = [(getattr(a, part).state_dict(), getattr(b, part).state_dict()) for part in ("unet", "vae", "text")]
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


@pytest.mark.parametrize("name", SIZES)
def test_the_real_networks_have_the_published_number_of_parameters(name):
    parts = FAMILIES[name]
    nets = [meta(UNet, UNetConfig, parts["unet"]), meta(VAE, VAEConfig, parts["vae"])]
    nets += [meta(CLIPText, CLIPTextConfig, parts[key]) for key in ("text_encoder", "text_encoder_2") if key in parts]
    assert tuple(sum(v.numel() for v in net.values()) for net in nets) == SIZES[name]
    assert tuple(map(len, nets)) == {"sd1": (686, 248, 196), "sd2": (686, 248, 372),
                                     "sdxl": (1680, 248, 196, 517)}[name]


def test_the_real_unet_of_stable_diffusion_1_has_compvis_names_and_shapes():
    own = meta(UNet, UNetConfig, FAMILIES["sd1"]["unet"])
    named = rename.to_theirs(rename.unet(own), own)
    assert len(named) == len(own) == 686
    heads = collections.Counter(name.split(".")[0] for name in named)
    assert heads.keys() == {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"}
    shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
              "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1), "middle_block.1.proj_in.bias": (1280,),
              "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768), "out.2.bias": (4,),
              "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
              "output_blocks.8.2.conv.weight": (640, 640, 3, 3), "output_blocks.11.1.proj_in.weight": (320, 320, 1, 1),
              "time_embed.2.weight": (1280, 1280), "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3)}
    assert {name: tuple(named[name].shape) for name in shapes} == shapes
    inside = {re.sub(r"^(input_blocks|output_blocks)\.\d+\.0\.|\.(weight|bias)$", "", name)
              for name in named if re.match(r"(in|out)put_blocks\.[1-9]\d*\.0\.(?!op)", name)}
    assert inside == BLOCK | {"skip_connection"}


def test_the_real_vae_and_controlnet_have_compvis_names():
    own = meta(VAE, VAEConfig, FAMILIES["sd1"]["vae"])
    named = rename.to_theirs(rename.vae(own), own)
    shapes = {"decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "decoder.up.0.block.2.norm1.weight": (128,),
              "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.up.1.block.0.nin_shortcut.bias": (256,),
              "encoder.down.2.downsample.conv.bias": (512,), "encoder.norm_out.weight": (512,)}
    assert len(named) == 248 and {name: tuple(named[name].shape) for name in shapes} == shapes
    own = meta(ControlNet, ControlNetConfig, {"cross_attention_dim": 768})
    named = rename.to_theirs(rename.unet(own), own)
    assert len(named) == 340 and {name.split(".")[0] for name in named} == {
        "time_embed", "input_blocks", "middle_block", "input_hint_block", "zero_convs", "middle_block_out"}
    assert tuple(named["input_hint_block.14.weight"].shape) == (320, 256, 3, 3)
    assert tuple(named["zero_convs.11.0.weight"].shape) == (1280, 1280, 1, 1)


@pytest.mark.parametrize("name, changes, family", [
    ("sd1", {}, "sd1"), ("sd2", {}, "sd2"), ("sd2-base", {"in_channels": 9}, "sd2-base"), ("sdxl", {}, "sdxl"),
    ("sd1", {"in_channels": 9}, "sd1"), ("sd1", {"time_cond_proj_dim": 256}, "sd1")])
def test_the_family_is_told_by_the_keys(name, changes, family):
    state = files_state(name, **changes)
    assert checkpoint.kind(state) == "checkpoint" and checkpoint.family(state) == family
    found = checkpoint.configs(None, state, "x.ckpt")
    assert found["unet"].get("in_channels") == changes.get("in_channels", 4)
    assert found["unet"] == {**FAMILIES[name]["unet"], "in_channels": 4, **changes}
    want = "LCMScheduler" if "time_cond_proj_dim" in changes else {
        "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}.get(family, "PNDMScheduler")
    if changes == {"in_channels": 9} and name == "sd1":
        want = "DDIMScheduler"
    assert found["scheduler"]["_class_name"] == want
    assert found["scheduler"]["prediction_type"] == ("v_prediction" if family == "sd2" else "epsilon")


@pytest.mark.parametrize("name, markers, notes, kind, zero", [
    ("sdxl", ["v_pred", "ztsnr"], {}, "v_prediction", True), ("sdxl", ["v_pred"], {}, "v_prediction", False),
    ("sd1", ["v_pred", "ztsnr"], {}, "v_prediction", True), ("sdxl", [], {}, "epsilon", False),
    ("sdxl", [], {"modelspec.prediction_type": "v"}, "v_prediction", False),
    ("sd1", [], {"modelspec.prediction_type": "v-prediction"}, "v_prediction", False),
    ("sd2", [], {"modelspec.prediction_type": "epsilon"}, "epsilon", False), ("sd2", [], {}, "v_prediction", False),
    ("sd2", [], {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    ("sd2", [], {"global_step": 875000}, "epsilon", False), ("sd1", [], {"global_step": 875000}, "epsilon", False),
    ("sdxl", ["v_pred"], {"modelspec.prediction_type": "epsilon"}, "v_prediction", False)])
def test_what_a_file_says_of_its_prediction_counts(name, markers, notes, kind, zero):
    state = files_state(name) | {marker: torch.zeros(0) for marker in markers}
    found = checkpoint.configs(None, state, "x", notes)
    scheduler, schedule = found["scheduler"], discrete(found["scheduler"])
    assert scheduler["prediction_type"] == kind and (schedule.alpha_bar[-1] == 0) == zero
    assert found["unet"]["sample_size"] == {"sd1": 64, "sd2": 96 if kind == "v_prediction" else 64, "sdxl": 128}[name]
    levels = from_diffusers(scheduler, 5, schedule)
    assert (levels[0].t == 999) == zero                                  # whose only time without a signal is the last
    if name == "sd2":                                                    # what was given goes before the metadata
        given = checkpoint.configs("sd2", state, "x", notes)
        assert given["scheduler"]["prediction_type"] == "v_prediction" and given["unet"]["sample_size"] == 96


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_markers_and_the_prediction_that_is_given_reach_the_pipeline(model, state, tmp_path, ending):
    marked = {**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    for name, content in (("marked", marked), ("plain", state)):
        path = tmp_path / f"{name}{ending}"
        save_state(content, path) if ending == ".safetensors" else torch.save({"state_dict": content}, path)

    def load_(path, **options):
        return StableDiffusion.from_pretrained(path, device="cpu", **options)

    config = {"config": model / "folder"}
    found = load_(tmp_path / f"marked{ending}", **config)
    assert (found.kind, found.schedule.alpha_bar[-1]) == ("v", 0)
    assert found("a", steps=2, output="tensor").isfinite().all()
    assert load_(tmp_path / f"marked{ending}", prediction_type="sample", **config).kind == "x0"
    assert load_(tmp_path / f"plain{ending}", **config).kind == "eps"
    assert load_(tmp_path / f"plain{ending}", prediction_type="v_prediction", **config).kind == "v"
    assert load_(model / "folder", prediction_type="v_prediction").kind == "v"
    with pytest.raises(ValueError, match="prediction_type is 'v'; supported are epsilon, sample, v_prediction"):
        load_(model / "folder", prediction_type="v")


def test_a_saved_file_says_what_its_unet_predicts(model, tmp_path):
    for kind, zero in (("v_prediction", True), ("v_prediction", False), ("epsilon", False), ("sample", False)):
        pipe = StableDiffusion.from_pretrained(model / "folder", device="cpu", prediction_type=kind)
        pipe.scheduler["rescale_betas_zero_snr"] = zero
        pipe.save_pretrained(tmp_path / "x.safetensors")
        again = StableDiffusion.from_pretrained(tmp_path / "x.safetensors", device="cpu", config=model / "folder")
        assert again.kind == pipe.kind and (again.schedule.alpha_bar[-1] == 0) == zero
        assert describe(tmp_path / "x.safetensors")["prediction_type"] == kind


def test_a_vae_alone_says_whose_latents_it_has(tmp_path):
    state = {"decoder.conv_in.weight": torch.ones(1), "encoder.conv_in.weight": torch.ones(1)}
    for notes, scale in (({}, None), ({"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, 0.13025)):
        assert checkpoint.values("vae", None, state, "x", notes).get("scaling_factor") == scale


def test_what_the_keys_cannot_tell_is_given():
    state = files_state("sd2")
    assert checkpoint.configs("sd2-base", state, "x")["scheduler"]["prediction_type"] == "epsilon"
    assert checkpoint.configs("sd2-base", state, "x")["unet"]["sample_size"] == 64


@pytest.mark.parametrize("name, wrong", [("sdxl", "sd1"), ("sd1", "sd2"), ("sd2", "sdxl"), ("sd1", "sd2-base")])
def test_a_config_of_another_family_is_refused(name, wrong):
    title = {"sdxl": "XL", "sd1": "1", "sd2": "2"}[name]
    with pytest.raises(ValueError, match=f"x.ckpt is a file of Stable Diffusion {title}: config='{wrong}' does not"):
        checkpoint.configs(wrong, files_state(name), "x.ckpt")


def test_a_config_that_is_none_says_what_there_is(model):
    with pytest.raises(FileNotFoundError, match="config is 'sd3'; it should be one of sd1, sd2-base, sd2, sdxl, or a"):
        StableDiffusion.from_pretrained(model / "model.safetensors", config="sd3")
    with pytest.raises(ValueError, match="is of no family that minidiff knows .*; give config="):
        StableDiffusion.from_pretrained(model / "model.safetensors", tokenizer=model / "words")


def test_prefixes_of_merges_and_schedule_buffers_are_accepted(model, state, tmp_path):
    other = {key.replace(VAE_, "vae.").replace(".text_model.", "."): value for key, value in state.items()}
    other |= {"betas": torch.ones(1000), "logvar": torch.zeros(9), "denoiser.sigmas": torch.ones(9),
              TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_state(other, tmp_path / "merge.safetensors")
    pipe = StableDiffusion.from_pretrained(tmp_path / "merge.safetensors", config=model / "folder", device="cpu")
    assert same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))


def test_ema_takes_the_running_average_and_otherwise_it_is_ignored(model, state, tmp_path):
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): 2 * value
                for key, value in state.items() if key.startswith(UNET)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    both = {**state, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    save_state(both, tmp_path / "both.safetensors")
    options = {"config": model / "folder", "device": "cpu"}
    plain = StableDiffusion.from_pretrained(tmp_path / "both.safetensors", **options)
    average = StableDiffusion.from_pretrained(tmp_path / "both.safetensors", ema=True, **options)
    assert same(plain, StableDiffusion.from_pretrained(model / "folder", device="cpu"))
    assert all(torch.equal(2 * value, average.unet.state_dict()[key]) for key, value in plain.unet.state_dict().items())
    with pytest.raises(ValueError, match="ema=True: the file holds no running average"):
        StableDiffusion.from_pretrained(model / "model.safetensors", ema=True, **options)
    with pytest.raises(ValueError, match="config and ema are for single files"):
        StableDiffusion.from_pretrained(model / "folder", ema=True)


def test_linear_and_convolutional_projections_load_for_each_other(model, state, tmp_path):
    convolutions = [key for key, v in state.items() if ("proj_" in key or ".attn_1." in key) and v.ndim == 4]
    assert len(convolutions) > 8
    other = {**state, **{key: state[key].flatten(1) for key in convolutions}}
    save_state(other, tmp_path / "x.safetensors")
    pipe = StableDiffusion.from_pretrained(tmp_path / "x.safetensors", config=model / "folder", device="cpu")
    assert same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))


def test_the_extra_layer_and_projection_of_openclip_are_left_out():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 99}
    whole = CLIPText(CLIPTextConfig.from_dict({**small, "num_hidden_layers": 3}))
    named = rename.to_theirs(rename.openclip(whole.state_dict()), whole.state_dict())
    named |= {"text_projection": torch.ones(16, 16), "logit_scale": torch.tensor(4.6)}
    text = CLIPText.from_state({**small, "num_hidden_layers": 2}, named, "x")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in text.state_dict().items())
    with pytest.raises(ValueError, match="unexpected: transformer.resblocks.2"):
        CLIPText.from_state({**small, "num_hidden_layers": 1}, named, "x")


def test_one_network_of_a_file_loads_alone(model, state, tmp_path):
    unet = UNet.from_pretrained(model / "model.safetensors", config=model / "folder")
    assert torch.equal(unet.conv_in.weight, state[UNET + "input_blocks.0.0.weight"])
    bare = {key.removeprefix(VAE_): value for key, value in state.items() if key.startswith(VAE_)}
    torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    vae = VAE.from_pretrained(tmp_path / "vae.ckpt", config=model / "folder" / "vae")
    assert torch.equal(vae.encoder.conv_in.weight, bare["encoder.conv_in.weight"])
    with pytest.raises(ValueError, match="vae.ckpt is no ControlNet but a VAE"):
        ControlNet.from_pretrained(tmp_path / "vae.ckpt")


def test_only_the_unet_comes_in_the_variant(model, tmp_path):
    pipe = StableDiffusion.from_pretrained(model / "folder", device="cpu")
    for parts in (["unet"], ["text_encoder", "vae"]):
        folder = shutil.copytree(model / "folder", tmp_path / parts[0])
        for part in parts:
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
        assert same(StableDiffusion.from_pretrained(folder, variant="fp16", device="cpu"), pipe)
        with pytest.raises(FileNotFoundError, match="; variant='fp16' would take it"):
            StableDiffusion.from_pretrained(folder, device="cpu")
        with pytest.raises(FileNotFoundError, match="looked for model.ema.safetensors or pytorch_model.ema.bin in"):
            StableDiffusion.from_pretrained(folder, variant="ema", device="cpu")
        assert len(describe(folder)["parts"]) == 3


def test_the_index_names_the_scheduler_and_what_it_means(model, tmp_path):
    folder = shutil.copytree(model / "folder", tmp_path / "x")
    index, path = read_json(folder / "model_index.json"), folder / "model_index.json"
    for change, name in (({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "EulerDiscreteScheduler"),
                         ({"force_zeros_for_empty_prompt": True}, "DDIMScheduler")):
        weights.write_atomic(path, weights.json.dumps({**index, **change}))
        pipe = StableDiffusion.from_pretrained(folder, device="cpu")
        assert pipe.scheduler["_class_name"] == name == describe(folder)["scheduler"] and not pipe.zeros
    for change, message in (({"requires_aesthetics_score": True}, "requires_aesthetics_score = true"),
                            ({"vae": "AutoencoderKL"}, "model_index.json has vae = 'AutoencoderKL'; it should be"),
                            ({"vae": ["diffusers"]}, r"has vae = \['diffusers'\]"), ({"unet": 3}, "has unet = 3")):
        weights.write_atomic(path, weights.json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            StableDiffusion.from_pretrained(folder, device="cpu")
    weights.write_atomic(path, weights.json.dumps({**index, "scheduler": [None, None]}))
    with pytest.raises(ValueError, match="whose model_index.json names no scheduler"):
        StableDiffusion.from_pretrained(model / "model.safetensors", config=folder)


@pytest.mark.parametrize("keys, message", [
    ({"lora_unet_conv_in.hada_w1_a": (1, 4)}, "but a LoHa$"), ({"lora_unet_conv_in.dora_scale": (4,)}, "but a DoRA$"),
    ({"lora_controlnet": (1,), "input_blocks.0.0.weight": (4, 4, 3, 3)}, "but a Control-LoRA$"),
    ({"weight": (4, 4), "bias": (4,)}, "but a file of an unknown kind$"),
    ({"lora_unet_conv_in.lora_down.weight": (1, 4)}, "but a LoRA: load a model first, then pipe.load_lora"),
    ({"control_model.time_embed.0.weight": (4, 4)}, "but a ControlNet: load it with ControlNet.from_pretrained"),
    ({"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)}, "but a VAE"),
    ({"input_blocks.0.0.weight": (4, 4, 3, 3)}, "but a U-Net"), ({"emb_params": (2, 768)}, "but a textual inversion"),
    ({"cond_stage_model.model.ln_final.weight": (4,)}, "but a text encoder"),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}, "but a model of Stable Diffusion 3"),
    ({"conditioner.embedders.0.model.ln_final.weight": (4,)}, "but a refiner of Stable Diffusion XL"),
    ({f"layer{i}": (2, 2, 2) for i in range(5)}, "but a file of an unknown kind")])
def test_a_file_of_another_kind_is_named(tmp_path, keys, message):
    save_state({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors is no whole model {message}"):
        StableDiffusion.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda s: {k: v for k, v in s.items() if not k.startswith(VAE_)}, "is incomplete: it lacks vae"),
    (lambda s: {k.replace("in_layers.2", "in_layer.2"): v for k, v in s.items()},
     "does not fit UNet; missing: .*unexpected: input_blocks.1.0.in_layer.2"),
    (lambda s: {**s, UNET + "out.2.bias": torch.zeros(7)}, r"wrong shape: conv_out.bias \[7\] instead of \[4\]"),
    (lambda s: {**s, UNET + "out.2.bias": torch.full((4,), float("nan"))}, "NaN or infinite numbers in conv_out.bias")],
    ids=["part", "key", "shape", "nan"])
def test_a_damaged_file_is_named(model, state, tmp_path, change, message):
    save_state(change(state), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors .*{message}") as error:
        StableDiffusion.from_pretrained(tmp_path / "x.safetensors", config=model / "folder")
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_asked_for(model, monkeypatch):
    monkeypatch.setattr(checkpoint, "configs", lambda *_: {
        name: read_json(model / "folder" / name / "config.json") for name in ("unet", "vae", "text_encoder")})
    with pytest.raises(ValueError, match="model.safetensors carries no tokenizer, like all single files: give token"):
        StableDiffusion.from_pretrained(model / "model.safetensors")


def test_a_large_model_with_nan_is_named_after_the_first_step(model, state, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHECKED", 0)
    for key, message in ((UNET + "out.2.bias", "the U-Net hold NaN or infinite numbers in conv_out.bias"),
                         (TEXT + "text_model.final_layer_norm.bias", "the text encoder hold NaN"),
                         (VAE_ + "decoder.conv_out.bias", "the VAE hold NaN")):
        save_state({**state, key: torch.full_like(state[key], float("nan"))}, tmp_path / "x.safetensors")
        pipe = StableDiffusion.from_pretrained(tmp_path / "x.safetensors", config=model / "folder", device="cpu")
        with pytest.raises(ValueError, match=message):
            pipe("a red house", steps=2)
        steps = pipe.stream("a red house", steps=9)
        next(steps)
        if not key.startswith(VAE_):
            with pytest.raises(ValueError, match=message):
                next(steps)


def test_a_folder_that_is_incomplete_or_another_pipeline_is_named(model, tmp_path):
    index = read_json(model / "folder" / "model_index.json")
    for change, message in (({"_class_name": "FluxPipeline"}, "is a FluxPipeline; supported are"),
                            ({"vae": [None, None]}, "model_index.json names no vae"),
                            ({"_class_name": "StableDiffusionXLPipeline"}, "names no text_encoder_2, tokenizer_2"),
                            ({"_class_name": 3}, "is a 3; supported are")):
        weights.write_atomic(tmp_path / "model_index.json", weights.json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            StableDiffusion.from_pretrained(tmp_path)


def test_parts_of_different_families_are_named(model, tmp_path):
    pipe = StableDiffusion.from_pretrained(model / "folder", device="cpu")
    config = {name: getattr(pipe, name).config for name in ("unet", "vae")}
    text = {**pipe.text.encoders[0].config.to_dict(), "architectures": ["CLIPTextModelWithProjection"]}
    for name, net, change, message in (
            ("unet", UNet, {"cross_attention_dim": 32}, "the U-Net expects prompts of width 32, not 24"),
            ("vae", VAE, {"latent_channels": 8}, "the U-Net expects latents of channels 4, not 8"),
            ("text_encoder", CLIPText, text, "the U-Net expects pooled prompts: False, not True")):
        pipe.save_pretrained(tmp_path)
        values = text if name == "text_encoder" else {**config[name].to_dict(), **change}
        net(net.Config.from_dict(values)).save_pretrained(tmp_path / name)
        if name == "text_encoder":
            index = read_json(tmp_path / "model_index.json")
            index[name] = ["transformers", *text["architectures"]]
            write_atomic(tmp_path / "model_index.json", json.dumps(index))
        with pytest.raises(ValueError, match=f"the parts are of different families: {message}"):
            StableDiffusion.from_pretrained(tmp_path, device="cpu")


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
    assert same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))
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


def test_saving_under_a_pickles_name_is_refused(model, tmp_path):
    pipe = StableDiffusion.from_pretrained(model / "folder", device="cpu")
    with pytest.raises(ValueError, match="x.ckpt: models are written as a folder, or as a single file that ends in"):
        pipe.save_pretrained(tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_built_at_random_before_it_is_loaded(model, monkeypatch):
    """Parameters come from the file: nothing draws random numbers, and nothing is allocated twice."""
    before = torch.get_rng_state()
    file = {"source": model / "model.safetensors", "config": model / "folder", "device": "cpu"}
    StableDiffusion.from_pretrained(**file)
    assert torch.equal(torch.get_rng_state(), before)
    opened = load_state(model / "model.safetensors")
    monkeypatch.setattr("minidiff.sd.models.load_state", lambda _: opened)
    pipe = StableDiffusion.from_pretrained(**file)
    assert pipe.unet.conv_in.weight.data_ptr() == opened[UNET + "input_blocks.0.0.weight"].data_ptr()

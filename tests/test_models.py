"""Single files: real key sets, kinds, prefixes, EMA, pickles of old trainers, and one sentence for each wrong file."""
import json
import shutil

import pytest
import torch

from minidiff.io import checkpoint, weights
from minidiff.io.checkpoint import PARTS
from minidiff.io.info import describe
from minidiff.io.plain_text import read_json
from minidiff.io.weights import load_state, save_state
from minidiff.io.write import write_atomic
from minidiff.nets.clip import CLIPText
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny

UNET, VAE_, TEXT = PARTS["unet"][0], PARTS["vae"][0], PARTS["text_encoder"][0]


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


def test_only_the_unet_comes_in_the_variant(model, tmp_path):
    pipe = StableDiffusion.from_pretrained(model / "folder", device="cpu")
    for parts in (["unet"], ["text_encoder", "vae"]):
        folder = shutil.copytree(model / "folder", tmp_path / parts[0])
        for part in parts:
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
        assert tiny.same(StableDiffusion.from_pretrained(folder, variant="fp16", device="cpu"), pipe)
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
        write_atomic(path, json.dumps({**index, **change}))
        pipe = StableDiffusion.from_pretrained(folder, device="cpu")
        assert pipe.scheduler["_class_name"] == name == describe(folder)["scheduler"] and not pipe.zeros
    for change, message in (({"requires_aesthetics_score": True}, "requires_aesthetics_score = true"),
                            ({"vae": "AutoencoderKL"}, "model_index.json has vae = 'AutoencoderKL'; it should be"),
                            ({"vae": ["diffusers"]}, r"has vae = \['diffusers'\]"), ({"unet": 3}, "has unet = 3")):
        write_atomic(path, json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            StableDiffusion.from_pretrained(folder, device="cpu")
    write_atomic(path, json.dumps({**index, "scheduler": [None, None]}))
    with pytest.raises(ValueError, match="whose model_index.json names no scheduler"):
        StableDiffusion.from_pretrained(model / "model.safetensors", config=folder)


@pytest.mark.parametrize("keys, message", [
    ({"lora_unet_conv_in.hada_w1_a": (1, 4)}, "but a LoRA: load a model first, then pipe.load_lora"),
    ({"lora_unet_conv_in.dora_scale": (4,)}, "but a LoRA: load a model first, then pipe.load_lora"),
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


def test_a_tokenizer_is_found_beside_the_file_or_asked_for(model, monkeypatch, tmp_path):
    folders = {"unet": "unet", "vae": "vae", "text_encoder": "text_encoder", "scheduler": "scheduler/scheduler_"}
    monkeypatch.setattr(checkpoint, "configs", lambda *_: {
        name: read_json(model / "folder" / f"{part}{'' if part[-1] == '_' else '/'}config.json")
        for name, part in folders.items()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = shutil.copy(model / "model.safetensors", tmp_path)
    said = ("model.safetensors carries no tokenizer, like all single files, and none is beside it, in the cache .*"
            "clip package: give tokenizer=.*: hf download openai/clip-")
    with pytest.raises(ValueError, match=said):
        StableDiffusion.from_pretrained(file, device="cpu")
    shutil.copytree(model / "folder" / "tokenizer", tmp_path / "tokenizer")
    found, own = (StableDiffusion.from_pretrained(path, device="cpu") for path in (file, model / "folder"))
    assert tiny.same(found, own) and found.text.tokenizers[0].get_vocab() == own.text.tokenizers[0].get_vocab()


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
        write_atomic(tmp_path / "model_index.json", json.dumps({**index, **change}))
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

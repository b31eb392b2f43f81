"""LoRA and textual inversion files as diffusers and PEFT write and read them: same pictures, same embeddings."""

import re
import types

import diffusers
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import CLIPTokenizer

from minidiff.io.lora import Loras, load_lora, save_lora
from minidiff.io.lycoris import Change
from minidiff.nets.low_rank import adapt
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.sd.pipeline import StableDiffusion
from tests.parity import families
from tests.parity.test_families import load
from tests.parity.test_pipeline import PROMPTS, build, generators
from tests.parity.test_unet import XL

UNET = {"attention": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
        "convolutions": ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out", "linear_1"]}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two LoRAs that diffusers and PEFT wrote: one with alpha in its metadata, one without."""
    folder = tmp_path_factory.mktemp("lora")
    theirs = build(folder)
    torch.manual_seed(1)
    for name, targets in UNET.items():
        for net, layers in ((theirs.unet, targets), (theirs.text_encoder, TEXT)):
            net.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=layers, init_lora_weights=False), name)
        metadata = {"unet_lora_adapter_metadata": theirs.unet.peft_config[name].to_dict(),
                    "text_encoder_lora_adapter_metadata": theirs.text_encoder.peft_config[name].to_dict()}
        theirs.save_lora_weights(
            folder / name, unet_lora_layers=small(get_peft_model_state_dict(theirs.unet, adapter_name=name)),
            text_encoder_lora_layers=small(get_peft_model_state_dict(theirs.text_encoder, adapter_name=name)),
            **(metadata if name == "attention" else {}))
    return folder


def small(state: dict) -> dict:
    """The same LoRA, weak enough that pictures stay pictures."""
    return {k: 0.3 * v for k, v in state.items()}


@pytest.fixture
def pipes(folder):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model")
    theirs.set_progress_bar_config(disable=True)
    return theirs, StableDiffusion.from_pretrained(folder / "model", device="cpu")


def drawn(theirs, ours):
    want = theirs(PROMPTS[0], num_inference_steps=4, generator=generators(1), output_type="pt").images
    return ours(PROMPTS[0], steps=4, output="tensor"), want


@pytest.mark.parametrize("name", UNET)
def test_diffusers_own_files_draw_its_picture(folder, pipes, name):
    theirs, ours = pipes
    plain, _ = drawn(theirs, ours)
    theirs.load_lora_weights(folder / name)
    ours.load_lora(folder / name)
    got, want = drawn(theirs, ours)
    assert_close(got, want, atol=1e-4, rtol=0)
    assert (got - plain).abs().max() > 0.01


def test_several_loras_with_scales_add_up_as_in_diffusers(folder, pipes):
    theirs, ours = pipes
    for name, scale in zip(UNET, (0.7, -0.4)):
        theirs.load_lora_weights(folder / name, adapter_name=name)
        ours.load_lora(folder / name / FILE, scale)
    theirs.set_adapters(list(UNET), [0.7, -0.4])
    assert_close(*drawn(theirs, ours), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"to_q": 5, "attn2.to_k": 0.5},
                                                             "rank_pattern": {"to_q": 2}}], ids=["rslora", "patterns"])
def test_alpha_in_the_metadata_counts_as_in_diffusers(pipes, options, tmp_path):
    theirs, ours = pipes
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=2, target_modules=UNET["attention"], init_lora_weights=False, **options)
    theirs.unet.add_adapter(config)
    theirs.save_lora_weights(tmp_path, unet_lora_layers=small(get_peft_model_state_dict(theirs.unet)),
                             unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict())
    theirs.unload_lora_weights()
    theirs.load_lora_weights(tmp_path)
    ours.load_lora(tmp_path)
    assert_close(*drawn(theirs, ours), atol=1e-4, rtol=0)


def kohya(state: dict, alpha: float) -> dict:
    """PEFT's names in kohya's spelling."""
    found = {}
    for key, tensor in state.items():
        path, end = key.split(".lora_")
        part, _, path = path.partition(".")
        if part == "text_encoder" and not path.startswith("text_model."):    # transformers 5.6 dropped this level
            path = f"text_model.{path}"
        name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + path.replace(".", "_")
        found[f"{name}.{'lora_down' if end.startswith('A') else 'lora_up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("name", UNET)
def test_kohya_files_draw_diffusers_picture(folder, pipes, name, tmp_path):
    theirs, ours = pipes
    state = load_file(folder / name / FILE)
    if name == "convolutions":                                   # its reader loses these layers of the text encoder
        state = {k: v for k, v in state.items() if k.startswith("unet")}
    save_file(kohya(state, alpha=1.5), tmp_path / "k.safetensors")
    theirs.load_lora_weights(tmp_path / "k.safetensors")
    ours.load_lora(tmp_path / "k.safetensors")
    assert_close(*drawn(theirs, ours), atol=1e-4, rtol=0)


def test_diffusers_loads_the_loras_that_we_save(folder, pipes, tmp_path):
    theirs, ours = pipes
    lora = load_lora(folder / "attention", ours.loras.parts)
    save_lora(lora, tmp_path / "ours.safetensors")
    theirs.load_lora_weights(tmp_path / "ours.safetensors")
    ours.loras.add(lora)
    assert_close(*drawn(theirs, ours), atol=1e-4, rtol=0)


def test_diffusers_reads_the_rank_and_alpha_that_we_note(pipes, tmp_path):
    """Different ones in U-Net and text encoder, and in one layer others still."""
    theirs, ours = pipes
    g = torch.Generator().manual_seed(3)
    lora = {}
    for name, layer in ours.loras.layers.items():
        if name.endswith(("to_q", "to_v", "q_proj")) and isinstance(layer, nn.Linear):
            rank = 3 if "mid_block" in name else 2
            out, width = layer.weight.shape
            lora[name] = Change(0.3 * torch.randn(rank, width, generator=g), 0.3 * torch.randn(out, rank, generator=g),
                                0.5 if "mid_block" in name else 2.0 if name.startswith("unet") else 1.5)
    save_lora(lora, tmp_path / "ours.safetensors")
    found = load_lora(tmp_path / "ours.safetensors", ours.loras.parts)
    assert {name: (len(each.down), each.factor) for name, each in found.items()} == {
        name: (len(each.down), each.factor) for name, each in lora.items()}
    theirs.load_lora_weights(tmp_path / "ours.safetensors")
    ours.loras.add(lora)
    assert_close(*drawn(theirs, ours), atol=1e-4, rtol=0)
    layers = {name: each for part in ("unet", "text_encoder") for name, each in getattr(theirs, part).named_modules()
              if hasattr(each, "scaling")}
    assert len(layers) == len(lora) and {max(each.scaling.values()) for each in layers.values()} == {0.5, 1.5, 2.0}


def compvis(name: str) -> str:
    """A layer of SDXL's U-Net by its name in the original code, two residual blocks per resolution."""
    where = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    if where:
        way, block, kind, j, rest = where.groups()
        i = 3 * int(block) + (2 if "samplers" in kind else int(j))
        ending = {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "downsamplers": "0.op",
                  "upsamplers": "2.conv"}[kind]
        name = f"input_blocks.{i + 1}.{ending}" if way == "down" else f"output_blocks.{i}.{ending}"
    for theirs, ours in {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                         "mid_block.resnets.1": "middle_block.2", "conv1": "in_layers.2", "conv2": "out_layers.3",
                         "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
                         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
                         "conv_in": "input_blocks.0.0", "conv_out": "out.2"}.items():
        name = re.sub(rf"\b{theirs}$|\b{theirs}(?=\.)", ours, name)
    return name


def test_sdxl_files_on_compvis_names_reach_the_layers_that_diffusers_finds(tmp_path):
    net = UNet(UNetConfig.from_dict(XL))
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    state = {}
    for i, (name, layer) in enumerate(layers.items()):                   # each with a number of its own
        spelled = "lora_unet_" + compvis(name).replace(".", "_")
        state[f"{spelled}.lora_down.weight"] = torch.full((1, *layer.weight.shape[1:]), float(i))
        state[f"{spelled}.lora_up.weight"] = torch.ones(len(layer.weight), 1, *[1] * (layer.weight.ndim - 2))
    save_file(state, tmp_path / "xl.safetensors")
    ours = load_lora(tmp_path / "xl.safetensors", {"unet": net})
    theirs, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        tmp_path / "xl.safetensors", unet_config=types.SimpleNamespace(layers_per_block=2))
    theirs = {re.sub(r"(_lora|\.lora)\.down\.weight", "", k).replace(".processor", ""): v.flatten()[0].item()
              for k, v in theirs.items() if "down.weight" in k}
    theirs = {re.sub("to_out$", "to_out.0", k): v for k, v in theirs.items()}
    assert {name: change.down.flatten()[0].item() for name, change in ours.items()} == theirs
    assert len(ours) == len(layers)


def test_old_namings_mean_the_same_as_pefts(folder, pipes, tmp_path):
    _, ours = pipes
    state = load_file(folder / "attention" / FILE)
    want = load_lora(folder / "attention", ours.loras.parts)
    unet = {"to_q.lora_A": "processor.to_q_lora.down", "to_q.lora_B": "processor.to_q_lora.up",
            "to_out.0.lora_A": "processor.to_out_lora.down", "to_out.0.lora_B": "processor.to_out_lora.up",
            ".lora_A": ".lora.down", ".lora_B": ".lora.up"}
    text = {"q_proj.lora_A": "to_q_lora.down", "q_proj.lora_B": "to_q_lora.up", "out_proj.lora_A": "to_out_lora.down",
            "out_proj.lora_B": "to_out_lora.up", ".lora_A": ".lora_linear_layer.down",
            ".lora_B": ".lora_linear_layer.up"}
    for prefix in ("unet.", ""):
        renamed = {}
        for key, tensor in state.items():
            for new, old in (unet if key.startswith("unet") else text).items():
                if new in key:
                    key = key.replace(new, old)
                    break
            renamed[key.replace("unet.", prefix)] = tensor
        save_file(renamed, tmp_path / "old.safetensors")
        got = load_lora(tmp_path / "old.safetensors", ours.loras.parts)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k].down, want[k].down) and torch.equal(got[k].up, want[k].up) for k in want)


@pytest.mark.parametrize("form", ["diffusers", "a1111", "kohya"])
def test_an_embedding_file_gives_diffusers_embeddings(pipes, form, tmp_path):
    theirs, ours = pipes
    vectors = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    if form == "diffusers":
        torch.save({"<cat-toy>": vectors}, path := tmp_path / "learned_embeds.bin")
    elif form == "a1111":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "<cat-toy>", "step": 99,
                    "sd_checkpoint": None}, path := tmp_path / "cat.pt")
    else:
        save_file({"emb_params": vectors}, path := tmp_path / "<cat-toy>.safetensors")
    theirs.load_textual_inversion(path, token="<cat-toy>" if form == "kohya" else None)
    assert ours.load_textual_inversion(path) == "<cat-toy>"
    prompts = ["a red <cat-toy>, night", "a house", "<cat-toy> on <cat-toy>" + " red" * 80]
    for prompt in prompts:
        want, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        assert_close(ours.text([prompt])[0], want, atol=1e-5, rtol=1e-5)
    want = theirs(prompts[0], num_inference_steps=3, generator=generators(1), output_type="pt").images
    assert_close(ours(prompts[0], steps=3, output="tensor"), want, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    return families.build(folder, "sdxl"), load(folder / "model")


def test_sdxl_loras_reach_both_text_encoders(sdxl, tmp_path):
    theirs, ours = sdxl
    torch.manual_seed(1)
    parts = {"unet": theirs.unet, "text_encoder": theirs.text_encoder, "text_encoder_2": theirs.text_encoder_2}
    for name, net in parts.items():
        layers = UNET["attention"] if name == "unet" else TEXT
        net.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=layers, init_lora_weights=False), "xl")
    states = {name: small(get_peft_model_state_dict(net, adapter_name="xl")) for name, net in parts.items()}
    theirs.save_lora_weights(tmp_path, **{f"{name}_lora_layers": state for name, state in states.items()})
    theirs.unload_lora_weights()
    plain = ours(PROMPTS[0], steps=3, output="tensor")
    theirs.load_lora_weights(tmp_path)
    handle = ours.load_lora(tmp_path)
    want = theirs(PROMPTS[0], num_inference_steps=3, generator=generators(1), output_type="pt",
                  guidance_scale=7.5).images
    theirs.unload_lora_weights()
    assert len(ours.loras.originals) == len(load_file(tmp_path / FILE)) // 2
    assert_close(ours(PROMPTS[0], steps=3, output="tensor"), want, atol=1e-4, rtol=0)
    ours.unload_lora(handle)
    assert torch.equal(ours(PROMPTS[0], steps=3, output="tensor"), plain)


def test_an_sdxl_embedding_file_gives_diffusers_embeddings(sdxl, tmp_path):
    theirs, ours = sdxl
    torch.manual_seed(0)
    state = {"clip_l": torch.randn(2, 24), "clip_g": torch.randn(2, 32)}
    save_file(state, tmp_path / "style.safetensors")
    for part, end in (("clip_l", ""), ("clip_g", "_2")):
        tokenizer = CLIPTokenizer.from_pretrained(theirs.tokenizer.name_or_path)     # the model's two are one object
        setattr(theirs, f"tokenizer{end}", tokenizer)
        theirs.load_textual_inversion(state[part], token="style", tokenizer=tokenizer,
                                      text_encoder=getattr(theirs, f"text_encoder{end}"))
    assert ours.load_textual_inversion(tmp_path / "style.safetensors") == "style"
    context, _, vec, _ = theirs.encode_prompt("a house, style, snow", do_classifier_free_guidance=False)
    got = ours.text(["a house, style, snow"])
    assert_close(got[0], context, atol=1e-5, rtol=1e-5)
    assert_close(got[1], vec, atol=1e-5, rtol=1e-5)


class Small(nn.Module):
    """A convolution with a stride and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_lora_in_training_is_pefts_values_and_gradients(alpha):
    torch.manual_seed(0)
    ours, theirs = Small().double(), Small().double()
    theirs.load_state_dict(ours.state_dict())
    loras = adapt(ours, "conv|linear", rank=2, alpha=alpha)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=alpha or 2, target_modules=["conv", "linear"]), theirs)
    for name, lora in loras.items():
        layer = theirs.get_submodule(name)
        for own, half in ((lora.down, layer.lora_A), (lora.up, layer.lora_B)):
            own.weight.data.normal_()
            half["default"].weight.data.copy_(own.weight.data)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    for net in (ours, theirs):
        net(x).square().sum().backward()
    for name, lora in loras.items():
        layer = theirs.get_submodule(name)
        assert_close(lora.down.weight.grad, layer.lora_A["default"].weight.grad)
        assert_close(lora.up.weight.grad, layer.lora_B["default"].weight.grad)
    assert all(p.grad is None for lora in loras.values() for p in lora.layer.parameters())


@pytest.mark.parametrize("config", [
    LoHaConfig(r=2, alpha=3, target_modules=["conv", "linear"]),
    LoHaConfig(r=2, alpha=3, target_modules=["conv", "linear"], use_effective_conv2d=True),
    LoKrConfig(r=2, alpha=3, target_modules=["conv", "linear"]),
    LoKrConfig(r=1, alpha=3, target_modules=["conv", "linear"], decompose_both=True, use_effective_conv2d=True),
    LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "linear"], use_dora=True)],
    ids=["loha", "loha-core", "lokr", "lokr-core", "dora"])
def test_pefts_own_loha_lokr_and_dora_files_change_the_weights_as_peft_does(config, tmp_path):
    torch.manual_seed(0)
    ours = Small()
    base = Small()
    base.load_state_dict(ours.state_dict())
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
            if "magnitude" in name:
                parameter.data.abs_()
    model.save_pretrained(tmp_path)
    loras = Loras({"unet": ours})
    loras.add(load_lora(tmp_path, {"unet": ours}))
    merged = model.merge_and_unload()
    for name in ("conv", "linear"):
        assert_close(ours.get_submodule(name).weight, merged.get_submodule(name).weight, rtol=1e-4, atol=1e-4)

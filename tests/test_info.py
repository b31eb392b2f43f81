"""What `describe` says of every kind of file and folder, from headers alone."""

import json
import shutil

import pytest
import torch

from minidiff.io import rename
from minidiff.io.checkpoint import FAMILIES, PARTS
from minidiff.io.info import describe
from minidiff.io.weights import load_state, save_state
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.layers import Blank
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline(folder / "words")
    pipe.save_pretrained(folder / "folder")
    pipe.save_pretrained(folder / "model.safetensors", dtype=torch.float16)
    return folder, pipe


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def real(path, name, markers=(), metadata=None, **changes):
    """A file of a published family's size that takes no room: only its header is written, the rest is a hole."""
    nets, named = FAMILIES[name], {}
    with torch.device("meta"), Blank():
        unet = UNet(UNetConfig.from_dict({**nets["unet"], **changes})).state_dict()
        vae = VAE(VAEConfig.from_dict(nets["vae"])).state_dict()
    named |= {PARTS["unet"][0] + k: v for k, v in rename.to_theirs(rename.unet(unet), unet).items()}
    named |= {PARTS["vae"][0] + k: v for k, v in rename.to_theirs(rename.vae(vae), vae).items()}
    header, end = {}, 0
    for key, value in named.items():
        size = 2 * value.numel()
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [end, end := end + size]}
    header |= {marker: {"dtype": "F16", "shape": [0], "data_offsets": [end, end]} for marker in markers}
    raw = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


@pytest.mark.parametrize("name, changes, family, kind", [
    ("sd1", {}, "Stable Diffusion 1, single file", "epsilon"), ("sd2", {}, "Stable Diffusion 2, single file", None),
    ("sd1", {"in_channels": 9}, "Stable Diffusion 1 inpainting, single file", "epsilon"),
    ("sd2-base", {"in_channels": 9}, "Stable Diffusion 2 inpainting, single file", "epsilon"),
    ("sdxl", {}, "Stable Diffusion XL, single file", "epsilon"),
    ("sd1", {"time_cond_proj_dim": 256}, "Stable Diffusion 1 LCM, single file", "epsilon")])
def test_a_file_of_a_published_family_is_described_from_its_header(tmp_path, name, changes, family, kind):
    real(tmp_path / "x.safetensors", name, **changes)
    assert {v.device.type for v in load_state(tmp_path / "x.safetensors", headers=True).values()} == {"meta"}
    found = describe(tmp_path / "x.safetensors")
    assert found["family"] == family and found["prediction_type"] == kind and found["dtype"] == "float16"
    assert found["parts"]["vae"]["parameters"] == 83_653_863
    more = 320 * 5 * 9 if "in_channels" in changes else 320 * 256 if changes else 0
    assert found["parts"]["unet"]["parameters"] == more + {
        "sd1": 859_520_964, "sd2": 865_910_724, "sd2-base": 865_910_724, "sdxl": 2_567_463_684}[name]


@pytest.mark.parametrize("name, markers, metadata, kind, zero", [
    ("sdxl", ["v_pred", "ztsnr"], None, "v_prediction", True), ("sdxl", ["v_pred"], None, "v_prediction", False),
    ("sdxl", [], {"modelspec.prediction_type": "v"}, "v_prediction", False),
    ("sd2", [], {"modelspec.prediction_type": "epsilon"}, "epsilon", False)])
def test_what_a_file_says_of_its_prediction_is_shown(tmp_path, name, markers, metadata, kind, zero):
    real(tmp_path / "x.safetensors", name, markers, metadata)
    found = describe(tmp_path / "x.safetensors")
    assert (found["prediction_type"], found["zero_terminal_snr"]) == (kind, zero)


def test_a_folder_and_its_file_hold_the_same(model):
    folder, pipe = model
    whole, file = describe(folder / "folder"), describe(folder / "model.safetensors")
    want = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text}
    for name, net in want.items():
        assert whole["parts"][name]["parameters"] == file["parts"][name]["parameters"] == parameters(net)
    assert (whole["dtype"], file["dtype"]) == ("float32", "float16")
    assert (whole["scheduler"], whole["prediction_type"]) == ("DDIMScheduler", "epsilon")
    assert whole["family"] == "StableDiffusionPipeline of its own size (context of 24)"
    assert file["family"] == "Stable Diffusion, single file"
    assert describe(folder / "folder" / "unet")["family"] == "UNet2DConditionModel"


def test_a_ckpt_tells_of_its_running_average(model, tmp_path):
    _, pipe = model
    own = pipe.unet.state_dict()
    named = {"model.diffusion_model." + k: v for k, v in rename.to_theirs(rename.unet(own), own).items()}
    average = {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in named.items()}
    torch.save({"state_dict": {**named, **average}, "callbacks": {ValueError: 1}}, tmp_path / "x.ckpt")
    assert list(describe(tmp_path / "x.ckpt")["parts"]) == ["unet", "unet, average"]


def test_networks_alone_are_named(model, tmp_path):
    _, pipe = model
    control = ControlNet.from_unet(pipe.unet, channels=(4, 8, 8))
    nets = {"VAE": pipe.vae, "U-Net": pipe.unet, "text encoder": pipe.text.encoders[0], "ControlNet": control}
    for title, net in nets.items():
        save_state({k: torch.zeros(v.shape) for k, v in net.state_dict().items()}, tmp_path / "x.safetensors")
        found = describe(tmp_path / "x.safetensors")
        assert found["family"] == title and found["parameters"] == parameters(net)


@pytest.mark.parametrize("keys, family", [
    ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)},
     "LoRA of Stable Diffusion 1"),
    ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (320, 4),
      "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)},
     "LoRA of Stable Diffusion XL"),
    ({"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3)}, "LoRA"),
    ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (3, 1)}, "model of Stable Diffusion 3"),
    ({"joint_blocks.0.x_block.attn.qkv.weight": (3, 1)}, "model of Stable Diffusion 3"),
    ({"transformer_blocks.0.attn.add_k_proj.weight": (3, 1)}, "model of Stable Diffusion 3"),
    ({"double_blocks.0.img_attn.qkv.weight": (3, 1)}, "model of FLUX"),
    ({"single_transformer_blocks.0.attn.to_q.weight": (3, 1), "transformer_blocks.0.attn.add_k_proj.weight": (3, 1)},
     "model of FLUX"),
    ({"emb_params": (2, 1024)}, "textual inversion of Stable Diffusion 2"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion of Stable Diffusion XL"),
    ({f"x{i}": (2, 2, 2) for i in range(5)}, "file of an unknown kind")])
def test_small_files_are_named(tmp_path, keys, family):
    save_state({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "x.safetensors")
    assert describe(tmp_path / "x.safetensors")["family"] == family


def test_a_textual_inversion_of_the_web_ui_is_named(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(3, 768)}, "name": "cat"},
               tmp_path / "cat.pt")
    found = describe(tmp_path / "cat.pt")
    assert (found["family"], found["parameters"]) == ("textual inversion of Stable Diffusion 1", 2304)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_textual_inversion_in_a_parameter_dict_is_named(tmp_path, legacy):
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(3, 768))})
    torch.save({"string_to_param": held}, tmp_path / "cat.pt", _use_new_zipfile_serialization=not legacy)
    found = describe(tmp_path / "cat.pt")
    assert (found["family"], found["parameters"]) == ("textual inversion of Stable Diffusion 1", 2304)
    torch.save({"string_to_param": 3}, tmp_path / "cat.pt")
    with pytest.raises(ValueError, match="should hold a flat dictionary of tensors; its string_to_param is a int"):
        describe(tmp_path / "cat.pt")


def test_a_folder_with_a_small_file_is_described_by_it(tmp_path):
    for name, key, shape, family in (("pytorch_lora_weights", "unet.conv_in.lora_A.weight", (1, 4, 3, 3), "LoRA"),
                                     ("learned_embeds", "<a>", (768,), "textual inversion of Stable Diffusion 1")):
        save_state({key: torch.zeros(shape)}, tmp_path / name / f"{name}.safetensors")
        assert describe(tmp_path / name)["family"] == family


@pytest.mark.parametrize("change", [{"sample_size": [8, 6]}, {"cross_attention_dim": [24, 24]}, {"in_channels": None},
                                    {"out_channels": "4"}, {"out_channels": None}])
def test_a_config_of_odd_values_is_described_all_the_same(model, tmp_path, change):
    folder = shutil.copytree(model[0] / "folder", tmp_path / "x")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert describe(folder)["parts"]["unet"]["class"] == "UNet2DConditionModel"


def test_what_is_no_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no model: no weight file, and without model_index.json"):
        describe(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no model nowhere"):
        describe("nowhere")


@pytest.mark.parametrize("part, change, message", [
    ("scheduler/scheduler_config", {"rescale_betas_zero_snr": "false"}, "zero_snr = 'false'; it should be true or"),
    ("scheduler/scheduler_config", {"prediction_type": ["epsilon"]}, "prediction_type = .* should be a text"),
    ("text_encoder/config", {"architectures": 5}, None), ("unet/config", {"_class_name": {"a": 1}}, None)])
def test_values_of_another_type_are_named_or_shown(model, tmp_path, part, change, message):
    path = shutil.copytree(model[0] / "folder", tmp_path / "x") / f"{part}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message:
        with pytest.raises(ValueError, match=message):
            describe(tmp_path / "x")
    else:
        named = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"}[path.parent.name]
        assert describe(tmp_path / "x")["parts"][path.parent.name]["class"] == named  # that of the index
        assert describe(path.parent)["family"] == str(*change.values())


def test_an_empty_textual_inversion_and_a_dtype_that_torch_lacks_are_no_parameters(tmp_path):
    torch.save({"string_to_param": {}, "name": "a"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is no textual inversion: its string_to_param holds no vectors"):
        describe(tmp_path / "a.pt")
    head = json.dumps({"a": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    assert describe(tmp_path / "b.safetensors")["parameters"] == 0


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_folder_without_a_unet_says_whose_it_is(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "transformer": ["diffusers", "X"]}))
    assert describe(tmp_path)["family"] == f"{name}, which minidiff does not draw with"

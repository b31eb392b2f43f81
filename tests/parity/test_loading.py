"""What diffusers saves, in every layout, loads as the same networks; what we save, diffusers loads."""

import copy
import shutil

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minidiff.io import rename
from minidiff.io.checkpoint import FAMILIES, PARTS
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.controlnet import ControlNet, ControlNetConfig
from minidiff.nets.layers import Blank
from minidiff.nets.unet import UNet, UNetConfig, micro_conditioning
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny
from tests.parity.families import build

NAMES = ("sd1", "sd2", "inpaint", "lcm", "sdxl")


@pytest.fixture(scope="module", params=NAMES)
def theirs(request, tmp_path_factory):
    """Diffusers' pipeline and its folder; Stable Diffusion 2 has OpenCLIP's text encoder."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sd2":
            patch.setitem(tiny.TEXT, "hidden_act", "gelu")
        return build(folder, request.param), folder / "model"


def same_networks(ours: StableDiffusion, theirs: diffusers.DiffusionPipeline) -> None:
    """Text encoder(s), U-Net and VAE give the same numbers, in float64."""
    ours.to(dtype=torch.float64)
    unet, vae = (copy.deepcopy(net).double() for net in (theirs.unet, theirs.vae))
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 200, (2, 77), generator=noise)
    for mine, name in zip(ours.text.encoders, ("text_encoder", "text_encoder_2")):
        want = copy.deepcopy(getattr(theirs, name)).double()(ids, output_hidden_states=True)
        assert_close(mine(ids)[0], mine.text_model.final_layer_norm(want.hidden_states[-1]))
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=noise).double()
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=noise).double()
    vec, more = None, {}
    if unet.config.addition_embed_type:
        sizes = torch.tensor([[32.0, 32, 0, 0, 9, 8]] * 2).double()
        more = {"text_embeds": torch.randn(2, 20, generator=noise).double(), "time_ids": sizes}
        vec = micro_conditioning(*more.values(), 8)
    assert_close(ours.unet(x, 500, context, vec), unet(x, 500, context, added_cond_kwargs=more).sample)
    z, image = (torch.randn(1, *shape, generator=noise).double() for shape in ((4, 8, 8), (3, 32, 32)))
    assert_close(ours.vae.decode(z), vae.decode(z / vae.config.scaling_factor).sample)
    assert_close(ours.vae.moments(image)[0], vae.encode(image).latent_dist.mean)


def load(source, **options) -> StableDiffusion:
    return StableDiffusion.from_pretrained(source, device="cpu", **options)


@torch.no_grad()
@pytest.mark.parametrize("layout", [
    {}, {"safe_serialization": False}, {"variant": "fp16"}, {"variant": "fp16", "safe_serialization": False},
    {"max_shard_size": "40KB"}, {"max_shard_size": "40KB", "variant": "fp16"}], ids=lambda layout: "-".join(layout))
def test_every_folder_layout_loads_as_the_same_networks(theirs, tmp_path, layout):
    pipe, _ = theirs
    pipe.save_pretrained(tmp_path, **layout)
    if "max_shard_size" in layout:
        assert list(tmp_path.glob("unet/*.index*.json")) and len(list(tmp_path.glob("unet/*-of-*"))) > 1
    if layout.get("safe_serialization") is False:
        assert list(tmp_path.glob("unet/*.bin")) and not list(tmp_path.glob("unet/*.safetensors"))
    same_networks(load(tmp_path, variant=layout.get("variant")), pipe)


def test_half_precision_files_are_cast_to_what_is_asked_for(theirs, tmp_path):
    pipe, folder = theirs
    load(folder).save_pretrained(tmp_path, dtype=torch.float16)
    again, exact = load(tmp_path), load(folder)
    for key, value in again.unet.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, exact.unet.state_dict()[key].half().float())


@torch.no_grad()
def test_parts_without_the_variant_are_those_that_diffusers_takes(theirs, tmp_path):
    """Each part in two forms of other numbers, or in one of them: what diffusers draws is drawn here."""
    pipe, folder = theirs
    other = shutil.copytree(folder, tmp_path / "x")
    stem = "diffusion_pytorch_model"
    (other / "vae" / f"{stem}.safetensors").rename(other / "vae" / f"{stem}.fp16.safetensors")
    plain = load_file(other / "unet" / f"{stem}.safetensors")
    save_file({k: v / 2 for k, v in plain.items()}, other / "unet" / f"{stem}.fp16.safetensors", {"format": "pt"})
    got = load(other, variant="fp16")
    want = type(pipe).from_pretrained(other, variant="fp16")
    same_networks(got, want)
    assert torch.equal(got.unet.conv_in.weight, plain["conv_in.weight"] / 2)


@torch.no_grad()
def test_a_single_file_loads_as_the_same_networks_here_and_in_diffusers(theirs, tmp_path):
    pipe, folder = theirs
    path = tmp_path / "model.safetensors"
    load(folder).save_pretrained(path)
    same_networks(load(path, config=folder), pipe)
    if isinstance(pipe, diffusers.LatentConsistencyModelPipeline):
        return  # diffusers' converter does not know the layer that reads the guidance weight
    again = type(pipe).from_single_file(str(path), config=str(folder), local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            got, want = getattr(again, name).state_dict(), getattr(pipe, name).state_dict()
            assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_folder_to_single_file_to_folder_is_the_identity(theirs, tmp_path):
    _, folder = theirs
    load(folder).save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors", config=folder).save_pretrained(tmp_path / "b")
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@torch.no_grad()
def test_what_is_saved_here_is_the_same_pipeline_in_diffusers(theirs, tmp_path):
    pipe, folder = theirs
    load(folder).save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(again) is type(pipe) and type(again.scheduler) is type(pipe.scheduler)
    same_networks(load(folder), again)
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, name):
            assert getattr(again, name)("a red house!").input_ids == getattr(pipe, name)("a red house!").input_ids


@torch.no_grad()
def test_a_controlnet_of_every_form_loads(tmp_path):
    torch.manual_seed(0)
    shape = {k: v for k, v in tiny.UNET.items() if k not in ("sample_size", "up_block_types")}
    net = diffusers.ControlNetModel(**shape, conditioning_embedding_out_channels=(16, 32, 96, 256))
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "folder")
    net.save_pretrained(tmp_path / "bin", safe_serialization=False)
    ours = ControlNet.from_pretrained(tmp_path / "folder")
    named = rename.to_theirs(rename.unet(ours.state_dict()), ours.state_dict())
    torch.save({f"control_model.{key}": value for key, value in named.items()}, tmp_path / "control.pth")
    torch.save({"state_dict": named}, tmp_path / "bare.ckpt")
    converted = single_file_utils.convert_controlnet_checkpoint(dict(named), dict(net.config))
    assert all(torch.equal(converted[key], value) for key, value in net.state_dict().items())
    x, context, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 24), torch.rand(2, 3, 64, 64)
    down, mid = net(x, 500, context, picture, return_dict=False)
    for name, config in (("folder", None), ("bin", None), ("control.pth", "folder"), ("bare.ckpt", "folder")):
        loaded = ControlNet.from_pretrained(tmp_path / name, config=config and tmp_path / config)
        for got, want in zip(loaded(x, 500, context, hint=loaded.look(picture)), (*down, mid), strict=True):
            assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_the_real_networks_are_those_that_diffusers_converts(name):
    """On the meta device: diffusers' converter takes our CompVis names to diffusers', each tensor to its own."""
    with torch.device("meta"), Blank():
        unet = UNet(UNetConfig.from_dict(FAMILIES[name]["unet"])).state_dict()
        vae = VAE(VAEConfig.from_dict(FAMILIES[name]["vae"])).state_dict()
    places = rename.unet(unet)
    named = {PARTS["unet"][0] + key: value for key, value in rename.to_theirs(places, unet).items()}
    kind = "text_time" if name == "sdxl" else None
    converted = single_file_utils.convert_ldm_unet_checkpoint(
        dict(named), {"layers_per_block": 2, "addition_embed_type": kind})
    assert converted.keys() == unet.keys() and all(converted[key] is unet[key] for key in unet)
    named = {PARTS["vae"][0] + key: value for key, value in rename.to_theirs(rename.vae(vae), vae).items()}
    converted = single_file_utils.convert_ldm_vae_checkpoint(
        dict(named), {"down_block_types": [None] * 4, "up_block_types": [None] * 4})
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in vae.items()}


@pytest.mark.parametrize("name, more", [*((name, {}) for name in FAMILIES), *(
    (name, {"in_channels": 9}) for name in ("sd1", "sd2-base", "sdxl")), ("sd1", {"time_cond_proj_dim": 256})])
def test_the_real_networks_have_the_keys_and_shapes_of_diffusers(name, more):
    parts = FAMILIES[name]
    with torch.device("meta"), Blank():
        unet, vae = UNet(UNetConfig.from_dict({**parts["unet"], **more})), VAE(VAEConfig.from_dict(parts["vae"]))
        pairs = [(unet, diffusers.UNet2DConditionModel.from_config({**parts["unet"], **more})),
                 (vae, diffusers.AutoencoderKL.from_config(vae.config.to_dict()))]
        for values in (parts[key] for key in parts if key.startswith("text")):
            theirs = getattr(transformers, values["architectures"][0])(transformers.CLIPTextConfig(**values))
            pairs.append((CLIPText(CLIPTextConfig.from_dict(values)), theirs))
    for ours, theirs in pairs:                                           # transformers 5.6 dropped one level of names
        a, b = ({k.removeprefix("text_model."): v.shape for k, v in net.state_dict().items()} for net in (ours, theirs))
        assert a == b


def test_names_of_the_real_controlnet_are_those_that_diffusers_converts():
    with torch.device("meta"), Blank():
        net = ControlNet(ControlNetConfig(cross_attention_dim=768)).state_dict()
    named = rename.to_theirs(rename.unet(net), net)
    converted = single_file_utils.convert_controlnet_checkpoint(
        dict(named), {"layers_per_block": 2, "conditioning_embedding_out_channels": (16, 32, 96, 256)})
    assert len(net) == 340 and converted.keys() == net.keys() and all(converted[key] is net[key] for key in net)


@pytest.mark.parametrize("name, layers", [("sd2", 23), ("sdxl", 32)])
def test_openclip_names_are_those_that_diffusers_converts(name, layers):
    from transformers import CLIPTextConfig as Theirs
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 99,
             "num_hidden_layers": layers, "projection_dim": 16, "hidden_act": "gelu"}
    want = CLIPTextModelWithProjection(Theirs(**small))
    ours = CLIPText(CLIPTextConfig.from_dict({**small, "architectures": ["CLIPTextModelWithProjection"]}))
    ours.load_state_dict(want.state_dict())
    prefix = PARTS["text_encoder"][1] if name == "sd2" else PARTS["text_encoder_2"][0]
    named = {prefix + key: value for key, value in rename.to_theirs(
        rename.openclip(ours.state_dict()), ours.state_dict()).items()}
    got = single_file_utils.convert_open_clip_checkpoint(want, named, prefix=prefix)
    assert all(torch.equal(got[key], value) for key, value in want.state_dict().items()
               if (name, key) != ("sd2", "text_projection.weight"))


def test_old_names_of_the_vae_and_its_convolutions_load(tmp_path):
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(tiny.VAE_))
    vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for four_dimensional in (False, True):
        renamed = {}
        for key, value in state.items():
            for new, name in old.items():
                if f"attentions.0.{new}." in key:
                    key = key.replace(new, name)
                    value = value[..., None, None] if four_dimensional and value.ndim == 2 else value
            renamed[key] = value
        torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        got = VAE.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(got[key], value) for key, value in vae.state_dict().items())
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).state_dict() \
            if not four_dimensional else got
        assert all(torch.equal(theirs[key], value) for key, value in got.items())

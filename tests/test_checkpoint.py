"""Single files: family, prefixes, averages and predictions, told by the keys or said beside them."""
import pytest
import torch

from minidiff.io import checkpoint, rename
from minidiff.io.checkpoint import FAMILIES, PARTS
from minidiff.io.weights import save_state
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.scheduler import discrete, from_diffusers
from tests import tiny

UNET, VAE_, TEXT = PARTS["unet"][0], PARTS["vae"][0], PARTS["text_encoder"][0]
# the parameters of the published networks
SIZES = {"sd1": (859_520_964, 83_653_863, 123_060_480), "sd2": (865_910_724, 83_653_863, 340_387_840),
         "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840)}


def files_state(name, **changes):
    """The tensors of a file of a published family, on the meta device."""
    parts = FAMILIES[name]
    unet, vae = tiny.meta(UNet, UNetConfig, {**parts["unet"], **changes}), tiny.meta(VAE, VAEConfig, parts["vae"])
    found = {UNET + k: v for k, v in rename.to_theirs(rename.unet(unet), unet).items()}
    return found | {VAE_ + k: v for k, v in rename.to_theirs(rename.vae(vae), vae).items()}


@pytest.mark.parametrize("name", SIZES)
def test_the_real_networks_have_the_published_number_of_parameters(name):
    parts = FAMILIES[name]
    nets = [tiny.meta(UNet, UNetConfig, parts["unet"]), tiny.meta(VAE, VAEConfig, parts["vae"])]
    nets += [tiny.meta(CLIPText, CLIPTextConfig, parts[key]) for key in ("text_encoder", "text_encoder_2")
             if key in parts]
    assert tuple(sum(v.numel() for v in net.values()) for net in nets) == SIZES[name]
    assert tuple(map(len, nets)) == {"sd1": (686, 248, 196), "sd2": (686, 248, 372),
                                     "sdxl": (1680, 248, 196, 517)}[name]


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
    assert tiny.same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))


def test_ema_takes_the_running_average_and_otherwise_it_is_ignored(model, state, tmp_path):
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): 2 * value
                for key, value in state.items() if key.startswith(UNET)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    both = {**state, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    save_state(both, tmp_path / "both.safetensors")
    options = {"config": model / "folder", "device": "cpu"}
    plain = StableDiffusion.from_pretrained(tmp_path / "both.safetensors", **options)
    average = StableDiffusion.from_pretrained(tmp_path / "both.safetensors", ema=True, **options)
    assert tiny.same(plain, StableDiffusion.from_pretrained(model / "folder", device="cpu"))
    assert all(torch.equal(2 * value, average.unet.state_dict()[key]) for key, value in plain.unet.state_dict().items())
    with pytest.raises(ValueError, match="ema=True: the file holds no running average"):
        StableDiffusion.from_pretrained(model / "model.safetensors", ema=True, **options)
    with pytest.raises(ValueError, match="config and ema are for single files"):
        StableDiffusion.from_pretrained(model / "folder", ema=True)


def test_one_network_of_a_file_loads_alone(model, state, tmp_path):
    unet = UNet.from_pretrained(model / "model.safetensors", config=model / "folder")
    assert torch.equal(unet.conv_in.weight, state[UNET + "input_blocks.0.0.weight"])
    bare = {key.removeprefix(VAE_): value for key, value in state.items() if key.startswith(VAE_)}
    torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    vae = VAE.from_pretrained(tmp_path / "vae.ckpt", config=model / "folder" / "vae")
    assert torch.equal(vae.encoder.conv_in.weight, bare["encoder.conv_in.weight"])
    with pytest.raises(ValueError, match="vae.ckpt is no ControlNet but a VAE"):
        ControlNet.from_pretrained(tmp_path / "vae.ckpt")

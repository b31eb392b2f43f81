"""A Stable Diffusion 1 of shrunken shape with random weights: 32×32 pixels, 8×8×4 latents, built in milliseconds."""

import json
import shutil

import torch

from minidiff.data import scenes
from minidiff.io.tokenizer import load_tokenizer, train_tokenizer
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.layers import Blank
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import Text

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
             "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "set_alpha_to_one": False,
             "clip_sample": False, "timestep_spacing": "leading", "prediction_type": "epsilon"}
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 8,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4}
VAE_ = {"sample_size": 32, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "scaling_factor": 0.5}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "projection_dim": 24}
CAPTIONS = [" ".join(sorted(scenes.words())), "a large red house on the left, snow, night, stars"]


def pipeline(folder) -> StableDiffusion:
    """The model, with its tokenizer trained into `folder`."""
    train_tokenizer(CAPTIONS, folder)
    tokenizer = load_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPText(CLIPTextConfig.from_dict({**TEXT, "vocab_size": tokenizer.get_vocab_size()}))
        unet = UNet(UNetConfig.from_dict(UNET))
        vae = VAE(VAEConfig.from_dict(VAE_))
    return StableDiffusion(Text([tokenizer], [text]).eval(), unet.eval(), vae.eval(), SCHEDULER)


def same(a: StableDiffusion, b: StableDiffusion) -> bool:
    """Whether two models have the same weights under the same names."""
    pairs = [(getattr(a, part).state_dict(), getattr(b, part).state_dict()) for part in ("unet", "vae", "text")]
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


def snapshot(pipe: StableDiffusion) -> dict[str, torch.Tensor]:
    """Copies of the weights that a LoRA may change."""
    return {k: v.clone() for net in pipe.loras.parts.values() for k, v in net.state_dict().items()}


def unchanged(state: dict, other: dict) -> bool:
    return all(torch.equal(v, other[k]) for k, v in state.items())


def meta(net: type, config: type, values: dict) -> dict:
    """The tensors of a network on the meta device."""
    with torch.device("meta"), Blank():
        return net(config.from_dict(values)).state_dict()


def controlnet(pipe: StableDiffusion) -> ControlNet:
    """A ControlNet of the model whose zero convolutions are filled with numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = ControlNet.from_unet(pipe.unet, (4, 8, 8)).eval()
        for name, p in net.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                torch.nn.init.normal_(p, std=0.3)
    return net


def equal(a: dict, b: dict) -> bool:
    """Whether two states hold the same tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one(**values) -> scenes.Scene:
    """A plain scene, with these attributes."""
    return scenes.Scene("day", "clear", "grass", "house", "red", "large", "centre")._replace(**values)


def changed(folder, tmp_path, **files):
    """A copy of a tokenizer's folder with these JSON files, or entries of them, changed."""
    to = shutil.copytree(folder, tmp_path / "words")
    for name, content in files.items():
        path = to / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **content}))
    return to

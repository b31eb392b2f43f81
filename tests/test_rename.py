"""The names of CompVis' and OpenCLIP's files: real key sets, both kinds of projections."""
import collections
import re

import pytest
import torch

from minidiff.io import rename
from minidiff.io.checkpoint import FAMILIES
from minidiff.io.weights import save_state
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.controlnet import ControlNet, ControlNetConfig
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny

BLOCK = {"in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"}


def test_the_real_unet_of_stable_diffusion_1_has_compvis_names_and_shapes():
    own = tiny.meta(UNet, UNetConfig, FAMILIES["sd1"]["unet"])
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
    own = tiny.meta(VAE, VAEConfig, FAMILIES["sd1"]["vae"])
    named = rename.to_theirs(rename.vae(own), own)
    shapes = {"decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), "decoder.up.0.block.2.norm1.weight": (128,),
              "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.up.1.block.0.nin_shortcut.bias": (256,),
              "encoder.down.2.downsample.conv.bias": (512,), "encoder.norm_out.weight": (512,)}
    assert len(named) == 248 and {name: tuple(named[name].shape) for name in shapes} == shapes
    own = tiny.meta(ControlNet, ControlNetConfig, {"cross_attention_dim": 768})
    named = rename.to_theirs(rename.unet(own), own)
    assert len(named) == 340 and {name.split(".")[0] for name in named} == {
        "time_embed", "input_blocks", "middle_block", "input_hint_block", "zero_convs", "middle_block_out"}
    assert tuple(named["input_hint_block.14.weight"].shape) == (320, 256, 3, 3)
    assert tuple(named["zero_convs.11.0.weight"].shape) == (1280, 1280, 1, 1)


def test_linear_and_convolutional_projections_load_for_each_other(model, state, tmp_path):
    convolutions = [key for key, v in state.items() if ("proj_" in key or ".attn_1." in key) and v.ndim == 4]
    assert len(convolutions) > 8
    other = {**state, **{key: state[key].flatten(1) for key in convolutions}}
    save_state(other, tmp_path / "x.safetensors")
    pipe = StableDiffusion.from_pretrained(tmp_path / "x.safetensors", config=model / "folder", device="cpu")
    assert tiny.same(pipe, StableDiffusion.from_pretrained(model / "folder", device="cpu"))


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

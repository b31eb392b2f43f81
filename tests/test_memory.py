"""The memory estimate against what is really alive, counted on the meta device, and what it says."""

import pytest
import torch

from minidiff.nets.layers import Blank
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE, VAEConfig
from minidiff.sd import memory
from tests import tiny
from tests.live import Live

XL = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
      "block_out_channels": (320, 640, 1280), "heads": (5, 10, 20), "transformer_layers_per_block": (1, 2, 2)}
MINI = {"block_out_channels": (64, 128, 192), "cross_attention_dim": 128,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}


def on_meta(build):
    with torch.device("meta"), Blank():
        return build().eval()


def peak(net, *args):
    with torch.inference_mode(), Live() as live:
        net(*args)
    assert live.now == 0
    return live.peak / 4


@pytest.mark.parametrize("shape", [{}, XL, MINI, tiny.UNET], ids=["sd1", "sdxl", "mini-sd", "tiny"])
@pytest.mark.parametrize("side", [32, 96])
def test_the_unets_estimate_is_what_is_alive_at_its_peak(shape, side):
    config = UNetConfig.from_dict({"attention_head_dim" if k == "heads" else k: v for k, v in shape.items()})
    net = on_meta(lambda: UNet(config))
    context = torch.zeros(2, 77, config.cross_attention_dim, device="meta")
    found = peak(net, torch.zeros(2, 4, side, side, device="meta"), 500.0, context)
    assert memory.unet_numbers(config) * 2 * side**2 == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (64, 64), (32, 64, 128), (64,)])
def test_the_vaes_estimate_is_what_is_alive_at_its_peak(channels):
    vae = on_meta(lambda: VAE(VAEConfig(block_out_channels=channels, layers_per_block=2)))
    found = peak(vae.decode, torch.zeros(1, 4, 16, 16, device="meta"))
    assert memory.vae_numbers(vae.config) * (16 * vae.factor) ** 2 == pytest.approx(found, rel=0.15)
    assert peak(vae.encode, torch.zeros(1, 3, 128, 128, device="meta")) < 1.1 * memory.vae_numbers(vae.config) * 128**2


def test_a_run_that_does_not_fit_is_refused_before_it_starts(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free", lambda device: asked.append(device) or 2**20)
    said = r"4 × 64×64 pixels need about 0.0029 GiB in the U-Net, and 0.00098 GiB are free on cpu; what helps: fewer"
    with pytest.raises(ValueError, match=said):
        pipe.stream("a red house", num_images=4, height=64, width=64)
    assert pipe("a red house", steps=1)[0].size == (32, 32)
    monkeypatch.setattr(memory, "free", lambda device: None)
    assert pipe("a red house", steps=1, num_images=4, height=64, width=64)[0].size == (64, 64)
    assert asked == [torch.device("cpu")] * 2


def test_what_helps_depends_on_what_is_switched_on(pipe, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    gpu = torch.device("cuda")

    def sentence(**more):
        settings = {"rows": 1, "pictures": 1, "sides": (512, 512), "tile": None, "offloaded": False, **more}
        with pytest.raises(ValueError) as error:
            memory.check(pipe.unet, pipe.vae, gpu, **settings)
        return str(error.value).split("what helps: ")[1]

    assert sentence() == "tile=512, dtype=torch.float16, pipe.offload(), a smaller height and width"
    assert sentence(tile=32, offloaded=True) == "dtype=torch.float16, a smaller height and width"
    assert sentence(rows=8, pictures=4).startswith("fewer pictures")


def test_an_offloaded_run_needs_room_for_the_weights_too(pipe, monkeypatch):
    settings = {"rows": 2, "pictures": 1, "sides": (32, 32), "tile": None}
    monkeypatch.setattr(memory, "free", lambda device: memory.weights(pipe.unet))
    memory.check(pipe.unet, pipe.vae, torch.device("cpu"), offloaded=False, **settings)
    with pytest.raises(ValueError, match="U-Net"):
        memory.check(pipe.unet, pipe.vae, torch.device("cpu"), offloaded=True, **settings)

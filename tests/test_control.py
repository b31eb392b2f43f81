"""ControlNets in a run: scales, windows, guess mode, families."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minidiff.guidance import cfg, controlled
from minidiff.nets.controlnet import ControlNet
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.settings import Settings
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture
def net(pipe) -> ControlNet:
    return tiny.controlnet(pipe)


def test_one_scale_for_each_call_makes_a_window():
    net = lambda x, t, residuals=None: x if residuals is None else x + sum(residuals)  # noqa: E731
    steered = controlled(net, lambda x, t, hint: (hint,), torch.ones(1), [0, 1, 0.5])
    assert [steered(torch.zeros(1), 0.0).item() for _ in range(3)] == [0, 1, 0.5]
    with pytest.raises(ValueError, match="fewer scales than calls"):
        steered(torch.zeros(1), 0.0)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, Fraction])
def test_a_scale_is_a_number_of_any_library(kind):
    net = lambda x, t, residuals=None: x if residuals is None else x + sum(residuals)  # noqa: E731
    assert controlled(net, lambda x, t, hint: (hint,), torch.ones(1), kind(0.5))(torch.zeros(1), 0.0) == 0.5


def test_guess_mode_controls_only_the_half_with_the_prompt(pipe, net):
    x, contexts = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 7, 24)
    hint = net.look(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        guided = cfg(controlled(pipe.unet, net, hint, guess=True), {"context": contexts[1]},
                     {"context": contexts[0]}, 3.0)(x, 7.0)
        residuals = net(x, 7.0, contexts[1], hint=hint, guess=True)
        without = pipe.unet(x, 7.0, contexts[0])
        given = pipe.unet(x, 7.0, contexts[1], residuals=residuals)
    assert_close(guided, without + 3.0 * (given - without), atol=1e-4, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(pipe, net):
    images = torch.rand(2, 3, 32, 32)
    run = {"steps": 3, "output": "tensor", "controlnet": net}
    both = pipe(["a red house", "snow"], control_image=images, num_images=2, **run)
    assert_close(pipe("snow", control_image=images[1], seed=2, num_images=2, **run), both[2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings, message", [
    ({"control_image": torch.rand(3, 32, 32), "controlnet": None}, "go together"),
    ({"control_image": None}, "go together"),
    ({"control_start": 0.5, "control_end": 0.5}, "0 ≤ start < end ≤ 1"),
    ({"control_end": 1.5}, "0 ≤ start < end ≤ 1"),
    ({"control_scale": float("nan")}, "finite"),
    ({"controlnet": [1, 2], "control_scale": [1.0, 2.0, 3.0]}, "2 controlnets, but 3 control_scales"),
    ({"controlnet": [1, 2], "control_image": [0]}, "2 controlnets, but 1 control_images"),
])
def test_settings_that_do_not_fit_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"controlnet": 1, "control_image": torch.rand(3, 32, 32), **settings})


def test_a_controlnet_of_another_family_is_an_error(pipe, net):
    run = {"steps": 1, "control_image": torch.rand(3, 32, 32)}
    with pytest.raises(ValueError, match="pixels per latent: 8, the model's: 4"):
        pipe("a red house", controlnet=ControlNet.from_unet(pipe.unet), **run)
    other = UNetConfig.from_dict({**tiny.UNET, "cross_attention_dim": 16})
    with pytest.raises(ValueError, match="another family than the model: its width of prompts: 16, the model's: 24"):
        pipe("a red house", controlnet=ControlNet.from_unet(type(pipe.unet)(other), (4, 8, 8)), **run)
    for prompts, n, count in ((1, 2, 3), (1, 2, 2), (2, 3, 3)):
        said = f"{count} control images for {prompts * n} pictures; give one, or as many as prompts: {prompts}"
        with pytest.raises(ValueError, match=said):
            pipe(["a red house"] * prompts, controlnet=net, num_images=n, steps=1,
                 control_image=torch.rand(count, 3, 32, 32))


def test_a_consistency_model_is_controlled_too(pipe):
    """Its U-Net alone is told the weight of guidance; with the zeros of a fresh ControlNet nothing changes."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_dict({**tiny.UNET, "time_cond_proj_dim": 8})).eval()
    lcm = StableDiffusion(pipe.text, unet, pipe.vae, {**tiny.SCHEDULER, "_class_name": "LCMScheduler"})
    settings = {"steps": 2, "output": "latent", "control_image": torch.rand(3, 32, 32)}
    plain = lcm("a red house", steps=2, output="latent")
    assert torch.equal(lcm("a red house", controlnet=ControlNet.from_unet(unet, (4, 8, 8)), **settings), plain)
    assert not torch.allclose(lcm("a red house", controlnet=tiny.controlnet(lcm), **settings), plain)

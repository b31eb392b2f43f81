"""A run: inpainting, offloading, compiling, and what is refused before it starts."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minidiff import samplers
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.schedule import Level
from minidiff.sd import run, scheduler
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny

PROMPT = "a red house"
IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


def with_unet(pipe, **config) -> StableDiffusion:
    """The same model with another random U-Net."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet(UNetConfig.from_dict({**tiny.UNET, **config})).eval()
    return StableDiffusion(pipe.text, unet, pipe.vae, pipe.scheduler)


@pytest.mark.quick
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_outside_the_mask_the_latents_stay(pipe, sampler):
    z = pipe.inpaint(PROMPT, IMAGE, LEFT, steps=4, sampler=sampler, output="latent")
    kept = pipe.vae.encode(2 * IMAGE[None] - 1, run.draw([torch.Generator().manual_seed(0)], (1, 4, 8, 8)))
    assert_close(z[..., 4:], kept[..., 4:])
    assert (z[..., :4] - kept[..., :4]).abs().max() > 0.1


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 3, 4])
def test_outside_the_mask_the_latents_stay_whatever_levels_a_sampler_yields_and_how_many(pipe, n):
    def own(denoise, x, levels):
        for step in samplers.ddim(denoise, x, levels[:n + 1]):
            yield step._replace(level=Level(*step.level))  # equal, not the same

    z = pipe.inpaint(PROMPT, IMAGE, LEFT, sampler=(own, scheduler.preset("sd-ddim", 4)), output="latent")
    known = pipe.vae.encode(2 * IMAGE[None] - 1, run.draw([torch.Generator().manual_seed(0)], (1, 4, 8, 8)))
    assert_close(z[..., 4:], known[..., 4:])
    assert (z[..., :4] - known[..., :4]).abs().max() > 0.1


@pytest.mark.quick
def test_a_mask_of_everything_paints_a_new_picture_but_for_the_noise(pipe):
    new = pipe(PROMPT, steps=3, latents=run.draw([torch.Generator().manual_seed(5)], (1, 4, 8, 8)), output="latent")
    everything = pipe.inpaint(PROMPT, IMAGE, torch.ones(32, 32), steps=3, output="latent",
                              latents=run.draw([torch.Generator().manual_seed(5)], (1, 4, 8, 8)))
    assert_close(everything, new)


@pytest.mark.quick
def test_an_inpainting_unet_sees_the_mask_and_the_rest(pipe):
    repainter, seen = with_unet(pipe, in_channels=9), []
    hook = repainter.unet.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    repainter.inpaint(PROMPT, IMAGE, LEFT, steps=2)
    hook.remove()
    hole = torch.zeros(1, 1, 8, 8)
    hole[..., :4] = 1
    assert len(seen) == 2 and seen[0].shape == (1, 9, 8, 8)  # once for both prompts
    for x in seen:
        assert_close(x[:, 4:5], hole)
        assert_close(x[:, 5:], seen[0][:, 5:])


@pytest.mark.quick
def test_masks_and_pictures_go_with_their_prompts(pipe):
    images, masks = torch.stack([IMAGE, IMAGE.flip(1)]), torch.stack([LEFT, 1 - LEFT])[:, None]
    both = pipe.inpaint(["a tree", PROMPT], images, masks, steps=3, num_images=2, output="tensor")
    alone = pipe.inpaint(PROMPT, IMAGE.flip(1), 1 - LEFT, steps=3, seed=3, output="tensor")
    assert_close(both[3:], alone, atol=1e-5, rtol=0)


@pytest.mark.quick
def test_masks_may_be_pictures(pipe):
    grey = Image.fromarray((255 * LEFT).byte().numpy())
    a, b = (pipe.inpaint(PROMPT, IMAGE, mask, steps=2, output="tensor") for mask in (grey.convert("RGB"), LEFT))
    assert a.equal(b)


@pytest.mark.quick
@pytest.mark.parametrize(("settings", "message"), [
    ({"mask": LEFT}, "a mask needs an image"), ({"image": IMAGE, "mask": 3 * LEFT}, "a mask is in .*from 0 to 3"),
    ({"image": IMAGE, "mask": []}, "there is no mask"), ({"image": IMAGE, "mask": "m.png"}, "a mask is a PIL"),
    ({"image": IMAGE, "mask": LEFT.expand(3, 1, 32, 32)}, "1 prompts, but 3 masks"),
    ({"prompt_2": "a tree"}, "prompt_2 is the second of two text encoders"),
    ({"original_size": (3,)}, "original_size is .3,.; it must be two whole numbers"),
    ({"tile": 30}, "tile is 30; it must be a positive multiple of 16")])
def test_a_setting_that_cannot_be_is_named(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, steps=2, **settings)


@pytest.mark.quick
def test_other_numbers_of_channels_are_named(pipe):
    with pytest.raises(ValueError, match="has 8 input channels; supported are 4 and, for inpainting, 9"):
        with_unet(pipe, in_channels=8)(PROMPT)
    with pytest.raises(ValueError, match="this is an inpainting model: give an image and a mask"):
        with_unet(pipe, in_channels=9)(PROMPT)


@pytest.mark.quick
def test_a_consistency_model_takes_one_call_per_step_and_is_told_w(pipe):
    lcm, seen = with_unet(pipe, time_cond_proj_dim=8), []
    hook = lcm.unet.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append((len(args[0]), kwargs["w"].tolist())), with_kwargs=True)
    lcm(PROMPT, steps=2, guidance_scale=8.5, sampler="lcm", negative_prompt="has no effect")
    hook.remove()
    assert seen == [(1, [7.5])] * 2


@pytest.mark.quick
def test_each_network_comes_to_the_worker_only_to_work(pipe, monkeypatch):
    moves, worker = [], torch.device("cpu")
    for name in ("text", "unet", "vae"):
        monkeypatch.setattr(getattr(pipe, name), "to", lambda device, name=name: moves.append((name, str(device))))
    monkeypatch.setattr(torch.nn.ModuleList, "to", lambda self, device: self[0].to(device))
    want = pipe.img2img(PROMPT, IMAGE, steps=3, output="tensor")
    assert moves == []
    monkeypatch.setattr(pipe, "worker", worker)
    assert pipe.img2img(PROMPT, IMAGE, steps=3, output="tensor").equal(want)
    assert moves == [(name, "cpu") for name in ("text", "vae", "unet", "vae") for _ in range(2)]


@pytest.mark.quick
def test_a_run_computes_the_keys_and_values_of_its_prompts_once_and_leaves_nothing_behind(pipe):
    layers, asked = [m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k")], []
    hooks = [layer.register_forward_hook(lambda layer, args, out: asked.append(layer)) for layer in layers]
    for prompt in (PROMPT, "a tree"):
        pipe(prompt, steps=3)
    for hook in hooks:
        hook.remove()
    assert asked == 2 * layers
    assert not any({"keys_values", "forward"} & vars(module).keys() for module in pipe.unet.modules())


def test_a_compiled_run_draws_the_same_picture(tmp_path):
    """Traced whole and once, not once per step; the translation to machine code is not our matter."""
    traces = []

    def backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    pipe = tiny.pipeline(tmp_path)
    want = pipe(PROMPT, steps=3, output="tensor")
    assert_close(pipe.compile(backend=backend)(PROMPT, steps=3, output="tensor"), want, atol=1e-5, rtol=0)
    pipe("a tree", steps=3)
    assert len(traces) == 2  # U-Net and decoder

"""StableDiffusion: what its settings mean, what it refuses, and that pictures depend on nothing else."""

import dataclasses
import io
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minidiff import samplers
from minidiff.nets.clip import CLIPText, CLIPTextConfig
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.sd import scheduler
from minidiff.sd.conditions import draw
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.settings import Settings
from minidiff.text import Text
from tests import tiny

pytestmark = pytest.mark.quick
PROMPT = "a red house"


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def tensor(pipe, prompt=PROMPT, **settings):
    return pipe(prompt, **{"steps": 3, "output": "tensor", **settings})


def test_a_list_comes_back_prompt_major(pipe):
    images = pipe(["a red house", "a tree"], steps=2, num_images=2)
    assert [image.size for image in images] == [(32, 32)] * 4
    both = tensor(pipe, ["a red house", "a tree"], num_images=2)
    assert_close(both[2:3], tensor(pipe, "a tree", seed=2), atol=1e-5, rtol=0)


def test_image_i_depends_on_seed_plus_i_alone(pipe):
    batch = tensor(pipe, num_images=3, seed=10, eta=1.0)
    assert_close(batch[2:], tensor(pipe, seed=12, eta=1.0), atol=1e-5, rtol=0)
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)


def test_the_global_generator_is_neither_read_nor_moved(pipe):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = tensor(pipe, eta=1.0)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert a.equal(tensor(pipe, eta=1.0))


def test_outputs_are_the_same_picture(pipe):
    z, image, pil = (tensor(pipe, output=output) for output in ("latent", "tensor", "pil"))
    assert z.shape == (1, 4, 8, 8) and image.shape == (1, 3, 32, 32)
    assert_close((pipe.vae.decode(z) / 2 + 0.5).clamp(0, 1), image)
    assert pil[0].getpixel((3, 5)) == tuple((255 * image[0, :, 5, 3]).round().int().tolist())


def test_the_stream_is_the_call_step_by_step(pipe):
    steps = list(pipe.stream(PROMPT, steps=3))
    assert len(steps) == 4 and steps[0].x0 is None
    assert steps[-1].x.equal(tensor(pipe, output="latent"))
    assert [step.level.t for step in steps[:3]] == [667, 334, 1]


def test_the_stream_checks_its_settings_at_once(pipe):
    with pytest.raises(ValueError, match="unknown sampler"):
        pipe.stream(PROMPT, sampler="magic")


def test_guidance_off_is_one_conditional_call(pipe):
    seen = []
    hook = pipe.unet.register_forward_hook(lambda net, args, out: seen.append(len(out)))
    off = tensor(pipe, guidance_scale=1.0, negative_prompt="a tree")
    tensor(pipe, guidance_scale=2.0)
    hook.remove()
    assert seen == [1, 1, 1, 2, 2, 2]
    assert off.equal(tensor(pipe, guidance_scale=0.5))


def test_a_negative_prompt_equal_to_the_prompt_undoes_guidance(pipe):
    assert_close(tensor(pipe, negative_prompt=PROMPT, guidance_scale=9.0), tensor(pipe, guidance_scale=1.0),
                 atol=1e-4, rtol=0)
    assert tensor(pipe, negative_prompt=None).equal(tensor(pipe, negative_prompt=""))


def test_negative_prompts_go_with_their_prompts(pipe):
    both = tensor(pipe, ["a red house", "a red house"], negative_prompt=["", "a tree"])
    assert_close(both[1:], tensor(pipe, negative_prompt="a tree", seed=1), atol=1e-5, rtol=0)


def test_clip_skip_changes_the_prompt_but_not_the_negative_prompt(pipe):
    skipped, _ = pipe.text([PROMPT], clip_skip=1)
    plain, _ = pipe.text([""])
    want = pipe(prompt_embeds=(skipped, None), negative_prompt_embeds=(plain, None), steps=3, output="tensor")
    assert_close(tensor(pipe, clip_skip=1), want)


def test_latents_are_the_unit_noise_of_the_seed(pipe):
    noise = draw([torch.Generator().manual_seed(4)], (1, 4, 8, 8))
    for name in ("ddim", "euler"):
        assert tensor(pipe, latents=noise, sampler=name).equal(tensor(pipe, seed=4, sampler=name))
    for name in ("euler_ancestral", "lcm"):                                # these draw more: never that noise again
        assert tensor(pipe, latents=noise, seed=4, sampler=name).equal(tensor(pipe, seed=4, sampler=name))


def test_a_sampler_may_be_a_function_and_a_grid(pipe):
    levels = scheduler.from_diffusers(pipe.scheduler, 3, pipe.schedule)
    assert tensor(pipe, sampler=(samplers.ddim, levels), steps=99).equal(tensor(pipe))


def test_img2img_keeps_more_with_less_strength(pipe):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    weak, strong = (pipe.img2img(PROMPT, image, strength=s, steps=20, output="latent") for s in (0.1, 0.9))
    z0 = pipe.vae.encode(2 * image[None] - 1)
    assert (weak - z0).norm() < (strong - z0).norm()
    assert len(list(pipe.stream(PROMPT, image=image, strength=0.5, steps=6))) == 4


def test_img2img_takes_pil_lists_and_tensors_alike(pipe):
    pil = Image.new("RGBA", (32, 32), (255, 0, 51, 255))
    flat = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 32, 32)
    a, b, c = (pipe.img2img(PROMPT, image, steps=4, output="tensor") for image in (pil, [pil], flat))
    assert a.equal(b)
    assert_close(a, c)


def test_what_a_picture_hides_is_not_drawn_from(pipe):
    clear, white = Image.new("RGBA", (32, 32), (255, 0, 51, 0)), torch.ones(3, 32, 32)
    a, b = (pipe.img2img(PROMPT, image, steps=4, output="tensor") for image in (clear, white))
    assert a.equal(b)
    with pytest.raises(ValueError, match="there are 1 prompts, but 2 masks"):
        pipe.inpaint(PROMPT, white, [clear, clear], steps=2)


def test_images_follow_their_prompts(pipe):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = pipe.img2img(["a red house", "a tree"], images, steps=4, num_images=2, output="tensor")
    assert_close(both[1:2], pipe.img2img("a red house", images[0], steps=4, seed=1, output="tensor"), atol=1e-5, rtol=0)


def test_sides_may_differ_from_the_training_size(pipe):
    assert tensor(pipe, height=24, width=36).shape == (1, 3, 24, 36)


def test_a_long_prompt_names_the_words_it_loses(pipe):
    with pytest.warns(UserWarning, match="longer than 77 tokens; left out: house, night"):
        tensor(pipe, "red " * 75 + "house, night")


def test_weights_are_read_when_asked_and_named_when_not(pipe):
    with pytest.warns(UserWarning, match=r"\(red:1.3\) is read as letters; with weights=True it is read as in AUTO"):
        letters = tensor(pipe, "a (red:1.3) house")
    weighted = tensor(pipe, "a (red:1.3) house", weights=True)
    with pytest.warns(UserWarning, match="BREAK is read as letters"):
        tensor(pipe, negative_prompt="fog BREAK rain")
    assert not torch.allclose(letters, weighted, atol=1e-3)
    assert torch.equal(tensor(pipe, "a (red:1.0) house", weights=True), tensor(pipe, "a red house"))
    long = " ".join(["red"] * 80)
    assert torch.equal(tensor(pipe, long, weights=True), tensor(pipe, long, long=True))


def test_an_empty_prompt_is_allowed(pipe):
    assert tensor(pipe, "").shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("settings", "message"), [
    ({"steps": 0}, "steps is 0"), ({"steps": -3}, "steps is -3"), ({"steps": 1001}, "steps is 1001"),
    ({"steps": 2.5}, "steps is 2.5"), ({"seed": -1}, "seed is -1"), ({"num_images": 0}, "num_images is 0"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan"), ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"), ({"eta": -0.1}, "eta is -0.1"),
    ({"strength": 1.01}, "strength is 1.01"), ({"output": "jpeg"}, "output is 'jpeg'"),
    ({"clip_skip": -1}, "clip_skip is -1"), ({"clip_skip": 7}, "clip_skip"),
    ({"sampler": (samplers.ddim, 5)}, "sampler is"), ({"sampler": "magic"}, "unknown sampler 'magic'; there are ddim"),
    ({"height": 30}, "height is 30; it must be a positive multiple of 4"), ({"width": -4}, "width is -4"),
    ({"height": 0}, "height is 0; it must be a whole"), ({"width": 32.0}, "width is 32.0; it must be a whole number"),
    ({"guidance_scale": "7"}, "guidance_scale is 7; it must be a finite"), ({"eta": "1"}, "eta is 1; it must be"),
    ({"strength": 0.3}, "strength needs an image"), ({"target_size": (9, 8)}, "target_size .* are for SDXL"),
    ({"crops_coords_top_left": (0, 3)}, "are for SDXL"), ({"original_size": 5}, "original_size is 5; it must be two"),
    ({"negative_prompt_embeds": torch.zeros(1, 77, 24)}, r"is a Tensor; it must be a pair \(context, vec\)"),
    ({"negative_prompt": "a", "negative_prompt_embeds": (torch.zeros(1, 77, 24), None)}, "either a negative_prompt or"),
    ({"eta": 0.5, "sampler": "euler"}, "eta belongs to ddim"),
    ({"latents": [1]}, "latents is a list; it must be a tensor"),
    ({"latents": torch.tensor(math.nan)}, "latents hold NaN"),
    ({"negative_prompt_embeds": (torch.full((1, 77, 24), math.inf), None)}, "negative_prompt_embeds hold NaN or inf"),
    ({"negative_prompt_embeds": (torch.zeros(77, 24), None)}, r"negative_prompt_embeds are \(77, 24\); they should be"),
    ({"negative_prompt_embeds": (torch.zeros(1, 77, 24), "x")}, r"must be a pair \(context, vec\) of tensors"),
    ({"image": torch.zeros(3, 32, 32), "strength": 0}, "strength 0 of 3 steps leaves no step; take more strength"),
    ({"controlnet": "folder", "control_image": torch.zeros(3, 32, 32)}, "controlnet is a str; it must be a ControlNet"),
    ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents have the shape \(1, 4, 4, 4\)"),
    ({"negative_prompt": ["a", "b"]}, "1 prompts, but 2 negative"),
    ({"prompt_embeds": (torch.zeros(1, 77, 24), None)}, "either a prompt or prompt_embeds"),
    ({"negative_prompt_embeds": (torch.zeros(1, 77, 5), None)}, r"of prompts are \(1, 77, 5\)"),
    ({"image": torch.zeros(3, 32, 32), "strength": 0.1}, "leaves no step"),
    ({"image": torch.full((3, 32, 32), 2.0)}, "from 2 to 2"), ({"image": torch.zeros(1, 32, 32)}, "an image tensor is"),
    ({"image": "house.png"}, "an image is a PIL picture"), ({"image": []}, "no image"),
    ({"image": torch.zeros(3, 3, 2)}, r"the picture is 2×3 pixels, too small for multiples of 4"),
    ({"image": torch.zeros(2, 3, 32, 32)}, "1 prompts, but 2 images"),
    ({"guidance_scale": 1e38}, "NaN or infinite")])
def test_a_setting_that_cannot_be_is_named(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        tensor(pipe, **settings)


@pytest.mark.parametrize("prompt", [[], None, [3], 7])
def test_a_prompt_is_text(pipe, prompt):
    for call in (tensor, lambda *row: tensor(*row, weights=True), lambda pipe, prompt: pipe.two_pass(prompt, steps=2)):
        with pytest.raises(ValueError, match="prompt"):
            call(pipe, prompt)


def test_img2img_and_inpainting_need_their_pictures(pipe):
    with pytest.raises(ValueError, match="img2img needs an image"):
        pipe.img2img(PROMPT, None)
    for given in ((None, torch.ones(32, 32)), (torch.ones(3, 32, 32), None)):
        with pytest.raises(ValueError, match="inpaint needs an image, and a mask"):
            pipe.inpaint(PROMPT, *given)


def test_devices_and_dtypes_that_are_none_are_named(pipe, folder):
    for device in ("gpu", "cuda:99"):
        for call in (pipe.to, pipe.offload, lambda device: StableDiffusion.from_pretrained(folder, device=device)):
            with pytest.raises(ValueError, match=f"there is no device '{device}' here; cpu always works"):
                call(device)
    for dtype in ("float16", torch.int8):
        with pytest.raises(ValueError, match=f"dtype is {dtype!r}; it must be a torch.dtype of real numbers"):
            StableDiffusion.from_pretrained(folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("name, here", [
    ("num_inference_steps", "steps"), ("generator", "seed, a number"), ("num_images_per_prompt", "num_images"),
    ("cross_attention_kwargs", r"pipe.load_lora\(path, scale\)"), ("cfg_scale", "guidance_scale"),
    ("guidence_scale", "guidance_scale"), ("output_type", "output")])
def test_a_setting_of_another_library_is_told_its_name_here(pipe, name, here):
    for call in (pipe, pipe.stream, pipe.two_pass):
        with pytest.raises(TypeError, match=f"there is no setting {name}; here it is {here}"):
            call(PROMPT, **{name: 1})
    with pytest.raises(TypeError, match="there is no setting xyzzy; there are negative_prompt, steps, guidance_scale"):
        pipe(PROMPT, xyzzy=1)


def test_help_leads_to_the_settings():
    import minidiff as md

    assert md.Settings is Settings and "help(md.Settings)" in StableDiffusion.__doc__
    assert all(field.name in md.Settings.__doc__ for field in dataclasses.fields(Settings))


def test_a_list_of_pictures_shows_itself_in_a_notebook(pipe):
    images = pipe(PROMPT, steps=1, num_images=5)
    assert isinstance(images, list) and len(images) == 5
    assert Image.open(io.BytesIO(images._repr_png_())).size == (4 * 34 - 2, 2 * 34 - 2)
    assert type(images)([images[0], images[0].resize((9, 9))])._repr_png_() is type(images)()._repr_png_() is None


def test_two_passes_draw_larger_what_the_first_one_drew(pipe):
    settings = {"steps": 4, "num_images": 2, "seed": 3, "output": "tensor"}
    small, large = tensor(pipe, **settings), pipe.two_pass(PROMPT, scale=2, strength=0.25, **settings)
    between = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic").clamp(0, 1)
    by_hand = pipe.img2img([PROMPT] * 2, between, strength=0.25, height=64, width=64, **settings | {"num_images": 1})
    assert large.shape == (2, 3, 64, 64)
    assert_close(large, by_hand, atol=1e-5, rtol=0)
    assert pipe.two_pass([PROMPT, "a tree"], scale=1.5, steps=2)[1].size == (48, 48)
    for settings, message in (({"scale": 0}, "positive scale"), ({"image": small}, "not from an image"),
                              ({"steps": 2, "strength": 0.1}, "leaves none to the second pass")):
        with pytest.raises(ValueError, match=message):
            pipe.two_pass(PROMPT, **settings)


def test_a_consistency_model_takes_four_steps_and_its_own_scale_unless_told(pipe, folder, tmp_path):
    plain = StableDiffusion.from_pretrained(folder, device="cpu")
    assert plain.settled(Settings()).steps == 25 and plain.settled(Settings()).guidance_scale == 7.5
    for settings in (Settings(sampler="lcm"), Settings(sampler=(samplers.lcm, scheduler.preset("lcm", 2)))):
        assert (plain.settled(settings).steps, plain.settled(settings).guidance_scale) == (4, 1.0)
    assert plain.settled(Settings(sampler="lcm", steps=8, guidance_scale=0.0)).guidance_scale == 0.0
    plain.scheduler = {**plain.scheduler, "_class_name": "LCMScheduler"}
    assert plain.settled(Settings()).steps == 4 and plain.settled(Settings(sampler="ddim")).steps == 25
    plain.unet.config = dataclasses.replace(plain.unet.config, time_cond_proj_dim=8)
    assert plain.settled(Settings()).guidance_scale == 8.5


def test_an_unknown_setting_is_named():
    with pytest.raises(TypeError, match="cfg_scale"):
        Settings(cfg_scale=3)


def test_save_and_load_give_the_same_picture(pipe, folder):
    again = StableDiffusion.from_pretrained(folder, device="cpu")
    assert again.size == 32 and again.kind == "eps"
    assert tensor(again).equal(tensor(pipe))


def test_half_precision_draws_about_the_same_picture(pipe, folder):
    half = StableDiffusion.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for net in (half.text, half.unet, half.vae) for p in net.parameters()} == {torch.bfloat16}
    assert (tensor(half) - tensor(pipe)).abs().mean() < 0.05


def test_in_float16_the_vae_stays_float32(folder):
    half = StableDiffusion.from_pretrained(folder, device="cpu", dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    half = StableDiffusion.from_pretrained(folder, device="cpu").to(dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model .*nowhere; give a folder, a file, or one of mini-sd"):
        StableDiffusion.from_pretrained(tmp_path / "nowhere")


def test_another_kind_of_model_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline; supported are pipelines of Stable Diffusion"):
        StableDiffusion.from_pretrained(tmp_path)


def test_an_unsupported_scheduler_is_named_and_another_can_be_asked_for(folder, tmp_path):
    pipe = StableDiffusion.from_pretrained(folder, device="cpu")
    pipe.scheduler["_class_name"] = "MagicScheduler"
    with pytest.raises(ValueError, match="MagicScheduler"):
        tensor(pipe)
    assert tensor(pipe, sampler="ddim").shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [(8, 8), (64, 64)])
def test_a_preview_has_the_pictures_size(pipe, size):
    z = torch.zeros(2, 4, *size)
    assert [image.size for image in pipe.preview(z)] == [(4 * size[1], 4 * size[0])] * 2


def test_a_model_of_two_sides_draws_them(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "x") / "unet" / "config.json"
    config = json.loads(path.read_text())

    def drawn(sides, **settings):
        path.write_text(json.dumps({**config, "sample_size": sides}))
        return StableDiffusion.from_pretrained(path.parent.parent, device="cpu")(PROMPT, steps=1, **settings)[0].size

    assert drawn([8, 6]) == (24, 32) and drawn([6.0, 8.0]) == (32, 24) and drawn(8) == (32, 32)
    assert drawn([8, 6], width=40) == (40, 32) and drawn(None, width=40, height=16) == (40, 16)
    with pytest.raises(ValueError, match="the U-Net's config has no sample_size: give height and width"):
        drawn(None)
    with pytest.raises(ValueError, match="UNetConfig has sample_size = '8'"):
        drawn("8")
    path.write_text(json.dumps({**config, "sample_size": [8, 6]}))
    pipe = StableDiffusion.from_pretrained(path.parent.parent, device="cpu")
    assert pipe.sides == (32, 24) and pipe.size == 32
    pipe.save_pretrained(tmp_path / "again")
    assert StableDiffusion.from_pretrained(tmp_path / "again", device="cpu").sides == (32, 24)


@pytest.mark.parametrize("settings", [{}, {"negative_prompt": "caf\udce9"}, {"long": True}])
def test_bytes_that_are_no_text_are_named(pipe, settings):
    with pytest.raises(ValueError, match="holds bytes that are not UTF-8; write it anew in UTF-8"):
        pipe("red" if "negative_prompt" in settings else "a caf\udce9", steps=1, **settings)


@pytest.mark.parametrize("change, message", [
    ({"vae": ["diffusers", "ConsistencyDecoderVAE"]}, "has a ConsistencyDecoderVAE as its vae; supported is Autoencod"),
    ({"text_encoder": ["transformers", "T5EncoderModel"]}, "a T5EncoderModel as its text_encoder; .* CLIPTextModel"),
    ({"tokenizer": ["transformers", "T5Tokenizer"]}, "a T5Tokenizer as its tokenizer; supported is CLIPTokenizer"),
    ({"force_zeros_for_empty_prompt": "false"}, "force_zeros_for_empty_prompt = 'false'; it should be true or false")])
def test_what_a_model_index_states_and_we_cannot_do_is_named(folder, tmp_path, change, message):
    path = shutil.copytree(folder, tmp_path / "x") / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_pretrained(path.parent)


def test_the_class_of_a_text_encoder_is_that_of_the_index(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "x") / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    for named in (["CLIPTextModelWithProjection"], "CLIPModel", 5):
        path.write_text(json.dumps({**config, "architectures": named}))
        assert not StableDiffusion.from_pretrained(path.parent.parent, device="cpu").text.pooled


@pytest.mark.parametrize("kind", [["epsilon"], {}, "v"])
def test_a_prediction_type_that_is_none_is_named(folder, kind):
    with pytest.raises(ValueError, match="prediction_type is .*; supported are epsilon, sample, v_prediction"):
        StableDiffusion.from_pretrained(folder, prediction_type=kind)


def test_a_unet_for_another_pooled_width_is_named(pipe):
    vec = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = UNet(UNetConfig.from_dict({**tiny.UNET, **vec, "projection_class_embeddings_input_dim": 99}))
    config = {**pipe.text.encoders[0].config.to_dict(), "architectures": ["CLIPTextModelWithProjection"]}
    text = Text(pipe.text.tokenizers, [CLIPText(CLIPTextConfig.from_dict(config))])
    with pytest.raises(ValueError, match="the U-Net expects pooled prompts of width 51, not 24"):
        StableDiffusion(text, unet, pipe.vae, tiny.SCHEDULER)

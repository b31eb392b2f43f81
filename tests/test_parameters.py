"""How a picture was made, in its file: read by AUTOMATIC1111's own expression and by this package; garbage is named."""
import json
import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff.generate import settings_of
from minidiff.io import parameters
from minidiff.sd.scheduler import NAMES, SPACINGS, named

pytestmark = pytest.mark.quick
# as in modules/infotext_utils.py of AUTOMATIC1111's stable-diffusion-webui: of the last line, and of the size in it
A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"^(\d+)x(\d+)$")
SETTINGS = {"prompt": "a (red:1.2) house,\nsnow", "negative_prompt": "fog, rain", "model": "folder/a, b: c.safetensors",
            "steps": 30, "sampler": "dpmpp_2m_sde_karras", "guidance_scale": 6.5, "seed": 4294967295, "height": 64,
            "width": 96, "strength": 0.4, "clip_skip": 1, "weights": True}


@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")])
def test_the_web_uis_expression_reads_what_is_written(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (96, 64)).save(path, **parameters.for_saving(SETTINGS, "0.1", kind))
    with Image.open(path) as image:
        if kind == "PNG":
            text = image.text["parameters"]
        else:                                                                # as piexif.helper.UserComment.load
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            text = comment[8:].decode("utf-16-be")
    *prompt, last = text.strip().split("\n")
    found = {name: json.loads(value) if value[0] == '"' else value for name, value in A1111.findall(last)}
    assert prompt == ["a (red:1.2) house,", "snow", "Negative prompt: fog, rain"]
    assert found == {"Steps": "30", "Sampler": "DPM++ 2M SDE", "Schedule type": "Karras", "CFG scale": "6.5",
                     "Seed": "4294967295", "Size": "96x64", "Model": "a, b: c", "Denoising strength": "0.4",
                     "Clip skip": "2", "Version": "minidiff 0.1"}
    assert SIZE.match(found["Size"]).groups() == ("96", "64")
    assert parameters.read(path)["settings"] == SETTINGS


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_is_written_under_a_name_that_is_read_again(name):
    spaced = [f"{name}_{word}" for word in SPACINGS if "use_karras_sigmas" in named_options(name)]
    for sampler in (name, *spaced):
        text = parameters.to_text({**SETTINGS, "sampler": sampler}, "0.1")
        assert named(parameters.from_text(text)["sampler"]) == named(sampler)


def named_options(name):
    try:
        return named(f"{name}_karras")
    except ValueError:
        return {}


def test_what_the_web_ui_wrote_is_read(tmp_path):
    text = ("a (red:1.2) house\nin snow\nNegative prompt: fog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, "
            'Seed: 5, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "a: 12, b: 34", Clip skip: 2, '
            "Version: v1.7.0")
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert settings_of(tmp_path / "a.png") == {
        "prompt": "a (red:1.2) house\nin snow", "weights": True, "negative_prompt": "fog", "steps": 20,
        "sampler": "DPM++ 2M Karras", "guidance_scale": 7.0, "seed": 5, "clip_skip": 1, "width": 512, "height": 768}
    newer = text.replace("DPM++ 2M Karras", "DPM++ 2M, Schedule type: Karras")
    assert parameters.from_text(newer)["sampler"] == "DPM++ 2M Karras"
    assert parameters.from_text("only: a prompt, no: more") == {"prompt": "only: a prompt, no: more", "weights": True}


@pytest.mark.parametrize("said, message", [
    ("{", "garbled"), ("[1]", "no JSON object"), ('{"prompt": 3}', "its prompt is a int"),
    ('{"out": "/etc/passwd"}', "a setting 'out', which this version of minidiff does not know"),
    ('{"overwrite": true}', "'overwrite'"), ('{"steps": true}', "its steps is a bool"),
    ('{"lora": [{}]}', "its lora is a list of something else"), ("[" * 10**5, "nested too deeply")])
def test_what_a_picture_says_is_not_trusted(tmp_path, said, message):
    info = PngInfo()
    info.add_text("minidiff", said)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=rf"what .*a.png says of itself is garbled: .*{re.escape(message)}|{message}"):
        parameters.read(tmp_path / "a.png")


def test_what_is_no_picture_or_has_too_much_to_say_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        parameters.read(tmp_path / "a.png")
    with pytest.raises(ValueError, match="too long for the metadata of a JPEG or WebP"):
        parameters.for_saving({**SETTINGS, "prompt": "x" * 40_000}, "0.1", "JPEG")
    with pytest.raises(ValueError, match="Steps is 'many', which is no number"):
        parameters.from_text("a\nSteps: many, Sampler: Euler, CFG scale: 7")

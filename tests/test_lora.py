"""LoRA and textual inversion on their own: what loading and removing leaves behind, and files that do not fit."""
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from minidiff.io.lora import Change, load_lora, save_lora
from minidiff.io.weights import save_state
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture
def pipe(tmp_path):
    return tiny.pipeline(tmp_path)


def lora(pipe, seed: int, rank: int = 2) -> dict[str, Change]:
    """A LoRA on every layer that can have one."""
    rng = torch.Generator().manual_seed(seed)
    return {name: Change(torch.randn(rank, *layer.weight.shape[1:], generator=rng),
                         torch.randn(len(layer.weight), rank, *[1] * (layer.weight.ndim - 2), generator=rng), 0.1)
            for name, layer in pipe.loras.layers.items()}


GOOD = {"unet.conv_out.lora_A.weight": torch.ones(1, 16, 3, 3), "unet.conv_out.lora_B.weight": torch.ones(4, 1, 1, 1)}


def test_removing_gives_the_weights_back_bit_for_bit_in_any_order(pipe, tmp_path):
    before = tiny.snapshot(pipe)
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_lora(lora(pipe, i), file)
    first, second, third = (pipe.load_lora(file, scale) for file, scale in zip(files, (1.0, -0.3, 1e4)))
    assert not tiny.unchanged(tiny.snapshot(pipe), before)
    pipe.unload_lora(second)
    pipe.unload_lora(third)
    alone = tiny.snapshot(pipe)
    pipe.unload_lora(first)
    assert tiny.unchanged(tiny.snapshot(pipe), before)
    pipe.load_lora(files[0])
    assert tiny.unchanged(tiny.snapshot(pipe), alone)
    pipe.load_lora(files[1])
    pipe.unload_lora()
    assert tiny.unchanged(tiny.snapshot(pipe), before)
    assert pipe.loras.originals == {}


def test_a_model_that_changed_its_dtype_meanwhile_gets_its_weights_back_in_the_new_one(pipe, tmp_path):
    plain = tiny.snapshot(pipe)
    save_lora(lora(pipe, 0), tmp_path / "a.safetensors")
    handle = pipe.load_lora(tmp_path / "a.safetensors")
    pipe.to(dtype=torch.bfloat16)
    pipe.unload_lora(handle)
    halved = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in plain.items()}
    assert tiny.unchanged(tiny.snapshot(pipe), halved)


def test_the_changed_weight_is_the_formula(pipe):
    layer = pipe.unet.down_blocks[0].resnets[0].conv1
    weight, name = layer.weight.clone(), "unet.down_blocks.0.resnets.0.conv1"
    change = lora(pipe, 0)[name]
    pipe.loras.add({name: change}, scale=0.7)
    delta = torch.einsum("or,rikl->oikl", change.up[..., 0, 0], change.down)
    assert_close(layer.weight, weight + 0.7 * 0.1 * delta)


def test_a_text_encoder_lora_without_out_proj_counts(pipe, tmp_path):
    """diffusers ignores q, k and v entries of such kohya files."""
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_state({f"{name}.lora_down.weight": torch.ones(1, 24), f"{name}.lora_up.weight": torch.ones(24, 1)},
               tmp_path / "te.safetensors")
    weight = pipe.text.encoders[0].text_model.encoder.layers[0].self_attn.q_proj.weight.clone()
    pipe.load_lora(tmp_path / "te.safetensors", 0.5)
    assert_close(pipe.text.encoders[0].text_model.encoder.layers[0].self_attn.q_proj.weight, weight + 0.5)


@pytest.mark.parametrize("state, message", [
    ({"lora_unet_nowhere.lora_down.weight": torch.ones(1, 4)}, "does not fit this model.*unknown: lora_unet_nowhere"),
    ({"lora_unet_conv_out.hada_w1_a": torch.ones(1, 4)}, "without its counterpart: unet.conv_out"),
    ({"lora_unet_conv_out.lokr_w1": torch.ones(4, 4), "lora_unet_conv_out.lokr_w2": torch.ones(2, 4)},
     r"of the wrong shape: unet.conv_out \[2, 4\]·\[4, 4\] for \[4, 16, 3, 3\]"),
    ({"lora_unet_conv_out.oft_blocks": torch.ones(1, 4)}, "is of the kind OFT, which is not supported"),
    ({"lora_unet_conv_out.a1.weight": torch.ones(1, 4)}, "is of the kind GLoRA, which is not supported"),
    ({"lora_unet_conv_out.diff_b": torch.ones(5)}, r"of the wrong shape: unet.conv_out.bias \[5\] for \[4\]"),
    ({"lora_unet_conv_out.dora_scale": torch.ones(4)}, "without its counterpart: unet.conv_out"),
    ({"lora_unet_conv_out.weight": torch.ones(4)}, "without its counterpart: unet.conv_out"),
    ({"unet.conv_out.lora_A.weight": torch.ones(1, 16, 3, 3)}, "without its counterpart: unet.conv_out"),
    ({"unet.conv_out.lora_A.weight": torch.ones(1, 8, 3, 3), "unet.conv_out.lora_B.weight": torch.ones(4, 1, 1, 1)},
     r"of the wrong shape: unet.conv_out \[4, 1, 1, 1\]·\[1, 8, 3, 3\] for \[4, 16, 3, 3\]"),
    ({"unet.conv_out.lora_A.weight": torch.ones(1, 16, 3, 3),
      "unet.conv_out.lora_B.weight": torch.full((4, 1, 1, 1), torch.nan)}, "NaN or infinite numbers in unet.conv_out"),
    ({**GOOD, "unet.conv_out.alpha": torch.tensor(torch.inf)}, "NaN or infinite numbers in unet.conv_out"),
    ({**GOOD, "unet.conv_out.alpha": torch.ones(3)}, "unknown: unet.conv_out.alpha"),
    ({**GOOD, "unet.conv_out.lora_A.weight": torch.ones(())}, "unknown: unet.conv_out.lora_A"),
    ({}, "holds no LoRA"),
    ({**GOOD, "lora_unet_conv_out.lora_down.weight": torch.ones(1, 16, 3, 3)},
     "for a layer that has one already: (lora_)?unet.conv_out.lora_(A|down).weight$"),
    ({**GOOD, "lora_unet_conv_out.alpha": torch.ones(()), "unet.conv_out.alpha": torch.ones(())},
     "for a layer that has one already: unet.conv_out.alpha"),
    ({k: v.to(torch.int8) for k, v in GOOD.items()}, "not of real numbers: unet.conv_out.lora_A.weight"),
    ({"unet.conv_out.lora_A.weight": torch.ones(0, 16, 3, 3), "unet.conv_out.lora_B.weight": torch.ones(4, 0, 1, 1)},
     "unknown: unet.conv_out.lora_A.weight"),
    ({**GOOD, "unet.conv_out.lora_B.bias": torch.ones(4)}, "unknown: unet.conv_out.lora_B.bias"),
    ({**GOOD, "unet.conv_out.hada_w1_a": torch.ones(4, 1)}, "without its counterpart: unet.conv_out"),
    ({"emb_params": torch.ones(2, 24)}, "bad.safetensors is no LoRA but a textual inversion"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3), "decoder.conv_in.weight": torch.ones(4, 4, 3, 3)},
     "bad.safetensors is no LoRA but a VAE"),
])
def test_a_file_that_does_not_fit_is_one_sentence_and_changes_nothing(pipe, state, message, tmp_path):
    before = tiny.snapshot(pipe)
    save_state(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)
    assert tiny.unchanged(tiny.snapshot(pipe), before)


@pytest.mark.parametrize("metadata, factor", [
    ("null", 1.0), ("{}", 1.0), ('{"unet.lora_alpha": null, "unet.alpha_pattern": null}', 1.0),
    ('{"unet.lora_alpha": 4, "unet.use_rslora": true}', 4 / 2**0.5), ('{"unet.lora_alpha": 3.0}', 1.5),
    ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"conv_out": 0}}', 0.0),
    ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"conv_in": 9}}', 2.0)])
def test_metadata_of_every_form_is_read(pipe, metadata, factor, tmp_path):
    state = {"unet.conv_out.lora_A.weight": torch.ones(2, 16, 3, 3),
             "unet.conv_out.lora_B.weight": torch.ones(4, 2, 1, 1)}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    assert load_lora(tmp_path / "a.safetensors", pipe.loras.parts)["unet.conv_out"].factor == pytest.approx(factor)


@pytest.mark.parametrize("metadata, message", [
    ("[1]", "it is a list, not an object"), ("3", "it is a int, not an object"),
    ('{"unet.lora_alpha": "4"}', "settings for unet are garbled: lora_alpha is '4'"),
    ('{"unet.alpha_pattern": ["conv_out"]}', r"alpha_pattern \['conv_out'\]"),
    ('{"unet.alpha_pattern": {"conv_out": "8"}}', "alpha_pattern {'conv_out': '8'}"),
    ('{"unet.alpha_pattern": {"(": 8}}', r"alpha_pattern '\('; supported are names of layers"),
    ('{"unet.use_rslora": "yes"}', "use_rslora 'yes'"), ('{"unet.lora_alpha": true}', "lora_alpha is True"),
    ('{"unet.peft_type": "ADALORA"}', "settings for unet say ADALORA; supported are LORA, LOHA, LOKR")])
def test_metadata_that_means_nothing_is_named(pipe, metadata, message, tmp_path):
    save_file(GOOD, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=message):
        load_lora(tmp_path / "bad.safetensors", pipe.loras.parts)


@pytest.mark.parametrize("alpha", [3.0, 3, torch.tensor(3), torch.tensor(3.0).half(), torch.tensor([3.0]).bfloat16()])
def test_alpha_counts_in_every_type(pipe, alpha, tmp_path):
    for key in ("unet.conv_out.alpha", "module.unet.conv_out.alpha"):
        head = key.removesuffix("unet.conv_out.alpha")
        torch.save({"state_dict": {**{head + k: v for k, v in GOOD.items()}, key: alpha}}, tmp_path / "a.pt")
        assert load_lora(tmp_path / "a.pt", pipe.loras.parts)["unet.conv_out"].factor == 3.0


def test_pefts_own_folder_says_how_strong_it_is(pipe, tmp_path):
    """As `peft.save_pretrained` writes it: names without the part, alpha in a file beside the weights."""
    state = {k.replace("unet.", "base_model.model."): v for k, v in GOOD.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 7, "alpha_pattern": {}, "use_rslora": false}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert load_lora(path, pipe.loras.parts)["unet.conv_out"].factor == 7.0


def test_garbled_metadata_is_named(pipe, tmp_path):
    save_file(GOOD, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="bad.safetensors has garbled lora_adapter_metadata"):
        load_lora(tmp_path / "bad.safetensors", pipe.loras.parts)


def test_unknown_keys_are_counted_beyond_ten(pipe, tmp_path):
    save_state({f"lora_unet_{i:02}.alpha": torch.ones(()) for i in range(13)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="lora_unet_09.alpha and 3 more"):
        load_lora(tmp_path / "bad.safetensors", pipe.loras.parts)


def test_a_scale_that_is_no_number_is_an_error(pipe):
    before = tiny.snapshot(pipe)
    for scale, said in ((float("nan"), "nan"), ("0.5", "'0.5'"), (None, "None")):
        with pytest.raises(ValueError, match=f"scale of a LoRA is {said}; it must be a finite number"):
            pipe.loras.add(lora(pipe, 0), scale)
    assert tiny.unchanged(tiny.snapshot(pipe), before)


def test_an_unknown_handle_is_an_error(pipe):
    with pytest.raises(ValueError, match="no LoRA is loaded under 7; there are none"):
        pipe.unload_lora(7)


def test_an_alpha_that_is_no_real_number_is_named(pipe, tmp_path):
    torch.save({**GOOD, "unet.conv_out.alpha": torch.tensor(1j)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit this model.*; unknown: unet.conv_out.alpha"):
        load_lora(tmp_path / "a.pt", pipe.loras.parts)
    with pytest.raises(ValueError, match="no LoRA is loaded under"):
        pipe.unload_lora([])


def test_a_prompt_may_name_loras_which_last_for_its_call(pipe, tmp_path):
    save_lora(lora(pipe, 0), tmp_path / "ink.safetensors")
    before = tiny.snapshot(pipe)
    draw = {"steps": 2, "output": "tensor"}
    named = f"a red house<lora:{tmp_path / 'ink'}:0.7>"
    steps = pipe.stream(named, weights=True, **draw)
    assert tiny.unchanged(tiny.snapshot(pipe), before)                        # not yet begun
    next(steps)
    assert not tiny.unchanged(tiny.snapshot(pipe), before)
    steps.close()
    drawn = pipe([named] * 2, weights=True, **draw)
    assert tiny.unchanged(tiny.snapshot(pipe), before)
    handle = pipe.load_lora(tmp_path / "ink.safetensors", 0.7)
    assert torch.equal(drawn, pipe(["a red house"] * 2, **draw))
    pipe.unload_lora(handle)
    with pytest.raises(ValueError, match="name different LoRAs; give each a call of its own"):
        pipe([named, "a red house"], weights=True, **draw)
    with pytest.raises(FileNotFoundError, match="no.safetensors"):
        pipe("a <lora:no:1>", weights=True)


def test_a_lora_of_another_family_is_one_short_sentence(pipe, tmp_path):
    keys = [f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn2_to_k" for i in range(40)]
    for width, theirs in ((768, "Stable Diffusion 1"), (2048, "Stable Diffusion XL"), (96, "its context is 96 wide")):
        save_state({f"{key}.lora_down.weight": torch.zeros(4, width) for key in keys}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=f"a.safetensors is a LoRA of .*{theirs}.*, and this model is of another "
                                             r"family \(its context is 24 wide\)$"):
            pipe.load_lora(tmp_path / "a.safetensors")

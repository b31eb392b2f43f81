"""LoRA and textual inversion on their own: what loading and removing leaves behind, and files that do not fit."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from minidiff.io.embeddings import load_embedding
from minidiff.io.lora import Change, load_lora, save_lora
from minidiff.io.tokenizer import load_tokenizer
from minidiff.io.weights import save_state
from minidiff.nets.clip import CLIPText, CLIPTextConfig
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


def snapshot(pipe) -> dict[str, torch.Tensor]:
    return {k: v.clone() for net in pipe.loras.parts.values() for k, v in net.state_dict().items()}


def same(state, other) -> bool:
    return all(torch.equal(v, other[k]) for k, v in state.items())


def test_removing_gives_the_weights_back_bit_for_bit_in_any_order(pipe, tmp_path):
    before = snapshot(pipe)
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_lora(lora(pipe, i), file)
    first, second, third = (pipe.load_lora(file, scale) for file, scale in zip(files, (1.0, -0.3, 1e4)))
    assert not same(snapshot(pipe), before)
    pipe.unload_lora(second)
    pipe.unload_lora(third)
    alone = snapshot(pipe)
    pipe.unload_lora(first)
    assert same(snapshot(pipe), before)
    pipe.load_lora(files[0])
    assert same(snapshot(pipe), alone)
    pipe.load_lora(files[1])
    pipe.unload_lora()
    assert same(snapshot(pipe), before)
    assert pipe.loras.originals == {}


def test_a_model_that_changed_its_dtype_meanwhile_gets_its_weights_back_in_the_new_one(pipe, tmp_path):
    plain = snapshot(pipe)
    save_lora(lora(pipe, 0), tmp_path / "a.safetensors")
    handle = pipe.load_lora(tmp_path / "a.safetensors")
    pipe.to(dtype=torch.bfloat16)
    pipe.unload_lora(handle)
    assert same(snapshot(pipe), {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in plain.items()})


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
    ({"lora_unet_conv_out.hada_w1_a": torch.ones(1, 4)}, "LoHa, LoKr and DoRA are not supported.*hada_w1_a"),
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
    ({**GOOD, "lora_unet_conv_out.dora_scale": torch.ones(4)}, "DoRA are not supported.*unknown: .*dora_scale"),
    ({"emb_params": torch.ones(2, 24)}, "bad.safetensors is no LoRA but a textual inversion"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3), "decoder.conv_in.weight": torch.ones(4, 4, 3, 3)},
     "bad.safetensors is no LoRA but a VAE"),
])
def test_a_file_that_does_not_fit_is_one_sentence_and_changes_nothing(pipe, state, message, tmp_path):
    before = snapshot(pipe)
    save_state(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)
    assert same(snapshot(pipe), before)


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
    ('{"unet.alpha_pattern": {"(": 8}}', r"alpha_pattern {'\(': 8}"),
    ('{"unet.use_rslora": "yes"}', "use_rslora 'yes'"), ('{"unet.lora_alpha": true}', "lora_alpha is True"),
    ('{"unet.use_dora": true}', "settings for unet say use_dora; supported are plain LoRAs"),
    ('{"unet.peft_type": "ADALORA"}', "settings for unet say ADALORA; supported are plain LoRAs")])
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
    before = snapshot(pipe)
    for scale, said in ((float("nan"), "nan"), ("0.5", "'0.5'"), (None, "None")):
        with pytest.raises(ValueError, match=f"scale of a LoRA is {said}; it must be a finite number"):
            pipe.loras.add(lora(pipe, 0), scale)
    assert same(snapshot(pipe), before)


def test_an_unknown_handle_is_an_error(pipe):
    with pytest.raises(ValueError, match="no LoRA is loaded under 7; there are none"):
        pipe.unload_lora(7)


def learn(pipe, tmp_path, word: str, vectors: torch.Tensor) -> None:
    save_state({word: vectors}, tmp_path / "learned.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "learned.safetensors") == word


def test_a_word_of_several_vectors_takes_their_place_and_number(pipe, tmp_path):
    vectors = torch.randn(3, 24)
    learn(pipe, tmp_path, "<cat-toy>", vectors)
    size = pipe.text.encoders[0].config.vocab_size
    ids = torch.tensor([pipe.text.tokenizers[0].encode("red <CAT-toy>, house").ids])
    assert ids[0, 2:5].tolist() == [size, size + 1, size + 2]
    table = pipe.text.encoders[0].text_model.embeddings
    assert_close(table(ids)[0, 2:5], vectors + table.position_embedding.weight[2:5])


def test_a_word_is_found_where_it_stands_alone(pipe, tmp_path):
    plain, red = pipe.text(["reddish house"])[0], pipe.text(["red house"])[0]
    learn(pipe, tmp_path, "red", torch.randn(24))
    assert torch.equal(pipe.text(["reddish house"])[0], plain)
    assert not torch.equal(pipe.text(["red house"])[0], red)


def test_new_words_leave_the_saved_model_as_it_was(pipe, tmp_path):
    before = snapshot(pipe)
    learn(pipe, tmp_path, "<a>", torch.randn(2, 24))
    learn(pipe, tmp_path, "<b>", torch.randn(24))
    pipe.save_pretrained(tmp_path / "model")
    again = type(pipe).from_pretrained(tmp_path / "model", device="cpu")
    assert same(snapshot(again), before)
    assert not torch.equal(again.text(["<a>"])[0], pipe.text(["<a>"])[0])


def test_the_end_of_text_is_found_beside_new_words():
    """Old configs say eos_token_id 2, for: the largest id. New words have larger ones."""
    config = {**tiny.TEXT, "vocab_size": 60, "with_projection": True}
    torch.manual_seed(0)
    old = CLIPText(CLIPTextConfig.from_dict({**config, "eos_token_id": 2})).eval()
    new = CLIPText(CLIPTextConfig.from_dict({**config, "eos_token_id": 59})).eval()
    new.load_state_dict(old.state_dict())
    for net in (old, new):
        net.text_model.embeddings.extra = torch.ones(1, 24)
    ids = torch.tensor([[58, 3, 60, 4, 59, 59]])
    assert torch.equal(old(ids)[1], new(ids)[1])


@pytest.mark.parametrize("state, message", [
    ({"<a>": torch.ones(2, 16)}, "are 16 wide, those of this model's text encoder 24.*another family"),
    ({"<a>": torch.ones(2, 24), "<b>": torch.ones(24)}, "is no textual inversion: it should hold one word"),
    ({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 32)}, "made for 2 text encoder"),
    ({" ": torch.ones(24)}, "the word ' ' for .*bad.safetensors is blank; give another token"),
    ({"<a>": torch.ones(0, 24)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(1, 2, 24)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(24, dtype=torch.int64)}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"<a>": torch.ones(())}, r"a tensor \(vectors, width\) of finite numbers"),
    ({"clip_l": torch.ones(2, 24), "clip_g": torch.ones(1, 32)}, "clip_l has 2 vectors and clip_g 1; they need"),
    ({}, "it should hold one word with its vectors"),
    ({"<a>": torch.full((24,), torch.inf)}, r"a tensor \(vectors, width\) of finite numbers"),
])
def test_an_embedding_that_does_not_fit_is_one_sentence(pipe, state, message, tmp_path):
    save_state(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_textual_inversion(tmp_path / "bad.safetensors")


def test_the_same_word_twice_is_an_error(pipe, tmp_path):
    learn(pipe, tmp_path, "<a>", torch.ones(24))
    with pytest.raises(ValueError, match="'<a>' is loaded already; give this textual inversion another token"):
        pipe.load_textual_inversion(tmp_path / "learned.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "learned.safetensors", token="<b>") == "<b>"


@pytest.mark.parametrize("make", [
    lambda v: {"string_to_param": nn.ParameterDict({"*": nn.Parameter(v)}), "string_to_token": {"*": torch.ones(())}},
    lambda v: {"string_to_param": nn.ParameterDict({"<cat>": nn.Parameter(v)}), "name": None},
    lambda v: {"string_to_param": {"*": v.half()}, "name": "<cat>", "step": np.int64(3), "sd_checkpoint": None},
    lambda v: {"<cat>": v.double(), "step": 500}, lambda v: {"<cat>": v[0]}, lambda v: {"emb_params": v, "name": 3},
    lambda v: {"string_to_param": {"*": v.bfloat16()}, "name": ""}, lambda v: {"*": nn.Parameter(v)}])
@pytest.mark.parametrize("legacy", [False, True])
def test_embeddings_of_every_trainer_load(pipe, make, legacy, tmp_path):
    vectors = torch.arange(24.0).expand(2, 24).clone()
    torch.save(make(vectors), tmp_path / "<cat>.pt", _use_new_zipfile_serialization=not legacy)
    word, [found] = load_embedding(tmp_path / "<cat>.pt")
    assert word == "<cat>" and found.dtype == torch.float32 and torch.equal(found, vectors[:len(found)])
    assert pipe.load_textual_inversion(tmp_path / "<cat>.pt") == "<cat>"


def test_a_word_that_is_no_text_is_named(pipe, tmp_path):
    vectors = torch.ones(24)
    torch.save({"string_to_param": {"*": vectors}, "name": 7}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the word 7 for .*a.pt is no text; give another token"):
        pipe.load_textual_inversion(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the text 'caf\\udce9' holds bytes that are not UTF-8"):
        pipe.load_textual_inversion(tmp_path / "a.pt", token="caf\udce9")


def test_a_pair_that_fits_one_encoder_of_two_is_learned_by_none(tmp_path):
    """As with SDXL: the first encoder must not keep what the second refuses."""
    pipe = tiny.pipeline(tmp_path)
    pipe.text.tokenizers.append(load_tokenizer(tmp_path))
    config = {**tiny.TEXT, "hidden_size": 32, "vocab_size": pipe.text.tokenizers[0].get_vocab_size()}
    pipe.text.encoders.append(CLIPText(CLIPTextConfig.from_dict(config)))
    save_state({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="are 24 wide, those of this model's text encoder 32"):
        pipe.load_textual_inversion(tmp_path / "x.safetensors")
    save_state({"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 32)}, tmp_path / "x.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "x.safetensors") == "x"


def test_an_embedding_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    for held in ({"*": Evil()}, Evil(), nn.ParameterDict({"*": nn.Parameter(torch.ones(1))})):
        if isinstance(held, nn.ParameterDict):
            held._parameters["*"] = Evil()
        torch.save({"string_to_param": held}, tmp_path / "evil.pt")
        with pytest.raises(ValueError, match="is no textual inversion"):
            load_embedding(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_an_alpha_that_is_no_real_number_is_named(pipe, tmp_path):
    torch.save({**GOOD, "unet.conv_out.alpha": torch.tensor(1j)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit this model.*; unknown: unet.conv_out.alpha"):
        load_lora(tmp_path / "a.pt", pipe.loras.parts)
    with pytest.raises(ValueError, match="no LoRA is loaded under"):
        pipe.unload_lora([])


def test_vectors_that_are_not_plain_are_named_and_an_encoders_name_is_no_word(tmp_path):
    for vectors in (torch.ones(2, 24).to_sparse(), torch.ones(2, 24, device="meta")):
        torch.save({"<a>": vectors}, tmp_path / "a.bin")
        with pytest.raises(ValueError, match="is no textual inversion: that is a tensor"):
            load_embedding(tmp_path / "a.bin")
    save_file({"clip_l": torch.ones(2, 24)}, tmp_path / "cat.safetensors")
    assert load_embedding(tmp_path / "cat.safetensors")[0] == "cat"
    with pytest.raises(ValueError, match="the word '' for .* is blank; give another token"):
        load_embedding(tmp_path / "cat.safetensors", token="")

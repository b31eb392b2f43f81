"""CLIP against transformers, on copied weights of shrunken shapes of the published text encoders."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minidiff.nets.clip import CLIP, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from minidiff.text import Text

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "projection_dim": 20}
TEXT = {**SHAPE, "vocab_size": 99, "bos_token_id": 97, "pad_token_id": 98, "eos_token_id": 98}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
EOS = 98


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def prompts() -> torch.Tensor:
    """Token ids with the first end of text early, late, and twice."""
    ids = torch.randint(0, 97, (3, 77))
    for row, places in enumerate(([5], [76], [3, 40])):
        ids[row, 0], ids[row, places] = 97, EOS
    return ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, EOS])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_text_encoder_same_as_transformers(tmp_path, kind, eos, act):
    config = transformers.CLIPTextConfig(**{**TEXT, "eos_token_id": eos, "hidden_act": act})
    reference = getattr(transformers, kind)(config).eval()
    reference.save_pretrained(tmp_path)
    net, ids = CLIPText.from_pretrained(tmp_path), prompts()
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        context, pooled = net(ids)
        torch.testing.assert_close(context, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        if kind == "CLIPTextModel":
            assert pooled is None
        else:
            torch.testing.assert_close(pooled, expected.text_embeds, atol=1e-5, rtol=1e-5)
        for skip in range(4):
            state = expected.hidden_states[-(skip + 1)]
            torch.testing.assert_close(net(ids, skip, norm=False)[0], state, atol=1e-5, rtol=1e-5)
            context, again = net(ids, skip)
            torch.testing.assert_close(context, net.text_model.final_layer_norm(state), atol=1e-5, rtol=1e-5)
            assert pooled is again is None or torch.allclose(pooled, again, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["bare", "prefixed"])
def test_text_encoder_reads_all_published_key_styles(tmp_path, prefix):
    net = CLIPText(CLIPTextConfig.from_dict(TEXT))
    net.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {k.replace("text_model.", prefix): v for k, v in load_file(file).items()}
    save_file({**state, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, file)
    for key, value in CLIPText.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(net.state_dict()[key], value)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_saved_text_encoder_loads_in_transformers(tmp_path, kind):
    net = CLIPText(CLIPTextConfig.from_dict({**TEXT, "architectures": [kind]})).eval()
    net.save_pretrained(tmp_path)
    reference, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = prompts()
    with torch.no_grad():
        torch.testing.assert_close(net(ids)[0], reference(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_both_towers_same_as_transformers_both_ways(tmp_path):
    reference = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION,
                                                               projection_dim=20)).eval()
    reference.save_pretrained(tmp_path / "theirs")
    net, ids, image = CLIP.from_pretrained(tmp_path / "theirs"), prompts(), torch.randn(2, 3, 32, 32)
    net.save_pretrained(tmp_path / "ours")
    back, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert CLIP.from_pretrained(tmp_path / "ours").config == net.config
    for model in (reference, back.eval()):
        expected = model(ids, image)
        torch.testing.assert_close(net.encode_text(ids), expected.text_embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.encode_image(image), expected.image_embeds, atol=1e-5, rtol=1e-5)
        logits = net.logit_scale.exp() * net.encode_text(ids) @ net.encode_image(image).T
        torch.testing.assert_close(logits, expected.logits_per_text, atol=1e-5, rtol=1e-5)


def test_the_towers_alone_same_as_transformers(tmp_path):
    clip = CLIP(CLIPTextConfig.from_dict(TEXT), CLIPVisionConfig.from_dict(VISION)).eval()
    ids, image = prompts(), torch.randn(2, 3, 32, 32)
    clip.text_encoder().save_pretrained(tmp_path / "text")
    reference = transformers.CLIPTextModel.from_pretrained(tmp_path / "text").eval()
    vision = CLIPVision(CLIPVisionConfig.from_dict(VISION)).eval()
    vision.save_pretrained(tmp_path / "vision")
    other = transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision").eval()
    other.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = reference(ids)
        torch.testing.assert_close(clip.text_encoder()(ids)[0], expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        unit = torch.nn.functional.normalize(clip.text_projection(expected.pooler_output), dim=-1)
        torch.testing.assert_close(clip.encode_text(ids), unit, atol=1e-5, rtol=1e-5)
        for net in (vision, CLIPVision.from_pretrained(tmp_path / "again")):
            torch.testing.assert_close(net(image), other(image).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [["CLIPTextModel"], ["CLIPTextModel", "CLIPTextModelWithProjection"]],
                         ids=["SD", "XL"])
def test_weighted_prompts_same_as_the_documented_recipe(tmp_path, kinds, tokenizer, vocabulary):
    """lpw_stable_diffusion in diffusers' examples/community: embeddings times weights, then the mean as it was."""
    words = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    shape = {**TEXT, "vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    references = [getattr(transformers, kind)(transformers.CLIPTextConfig(**shape)).eval() for kind in kinds]
    for i, reference in enumerate(references):
        reference.save_pretrained(tmp_path / str(i))
    text = Text([tokenizer] * len(kinds), [CLIPText.from_pretrained(tmp_path / str(i)) for i in range(len(kinds))])
    pieces = [("a ", 1.0), ("large red", 1.4), (" house, ", 1.0), ("snow", 1 / 1.1), (" and a tree", 0.0)]
    ids, weights = [words.bos_token_id], [1.0]
    for piece, weight in pieces:
        found = words(piece, add_special_tokens=False).input_ids
        ids, weights = ids + found, weights + [weight] * len(found)
    left = 77 - len(ids)
    ids, weights = torch.tensor([ids + [words.eos_token_id] * left]), torch.tensor([weights + [1.0] * left])
    parts = []
    with torch.no_grad():
        for reference in references:
            states = reference(ids, output_hidden_states=True)
            x = states.last_hidden_state if len(kinds) == 1 else states.hidden_states[-2]
            mean = x.float().mean(axis=[-2, -1])
            x = x * weights.unsqueeze(-1)
            parts.append(x * (mean / x.float().mean(axis=[-2, -1])).unsqueeze(-1).unsqueeze(-1))
        context, vec = text(["a (large red:1.4) house, [snow]( and a tree:0)"], weights=True)
    torch.testing.assert_close(context, torch.cat(parts, -1), atol=1e-5, rtol=1e-5)
    assert vec is None or torch.equal(vec, text(["a large red house, snow and a tree"])[1])

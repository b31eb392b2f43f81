"""CLIP on its own: parameter counts, what clip_skip and the towers return, initialization, training, bad configs."""
import pytest
import torch

from minidiff.nets.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig

pytestmark = pytest.mark.quick
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "projection_dim": 8}
TEXT = CLIPTextConfig(vocab_size=20, eos_token_id=19, **SHAPE)
VISION = CLIPVisionConfig(image_size=8, patch_size=4, **SHAPE)
SD1 = {"architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
       "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
       "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
       "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
       "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408}
SD2 = {**SD1, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
       "hidden_act": "gelu", "projection_dim": 512}
XL2 = {**SD2, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
       "projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}


@pytest.mark.parametrize("config, tensors, parameters", [(SD1, 196, 123_060_480), (SD2, 372, 340_387_840),
                                                         (XL2, 517, 694_659_840)], ids=["sd1", "sd2", "sdxl-2"])
def test_published_text_encoders_have_exactly_their_parameters(config, tensors, parameters):
    with torch.device("meta"):
        net = CLIPText(CLIPTextConfig.from_dict(config))
    assert len(net.state_dict()) == tensors
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_both_towers_return_unit_vectors_and_learn_to_agree():
    torch.manual_seed(0)
    clip = CLIP(TEXT, VISION)
    ids, image = torch.tensor([[18, 1, 19], [18, 2, 19], [18, 3, 19]]), torch.randn(3, 3, 8, 8)
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    for _ in range(60):
        text, seen = clip(ids, image)
        torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(seen.norm(dim=-1), torch.ones(3))
        loss = torch.nn.functional.cross_entropy(clip.logit_scale.exp() * text @ seen.T, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in clip.parameters())
    assert loss < 0.05


def test_the_text_encoder_shares_the_towers_parameters():
    clip = CLIP(TEXT, VISION)
    text = clip.text_encoder()
    assert text.text_model is clip.text_model and text.config == TEXT
    assert not any(p.is_meta for p in text.parameters())


def test_config_round_trips():
    for config in (SD1, SD2, XL2):
        ours = CLIPTextConfig.from_dict(config)
        assert CLIPTextConfig.from_dict(ours.to_dict()) == ours
    both = CLIPConfig(TEXT, VISION)
    assert CLIPConfig.from_dict(both.to_dict()) == both


@pytest.mark.parametrize("change, message", [({"hidden_act": "relu"}, "hidden_act is 'relu', supported are quick_gelu"),
                                             ({"num_attention_heads": 7}, "7 heads do not divide the width 768"),
                                             ({"use_attention_mask": True}, "does not support use_attention_mask")])
def test_a_config_that_we_would_not_honour_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextConfig.from_dict({**SD1, **change})


def test_works_under_bfloat16_autocast_and_in_float64():
    torch.manual_seed(0)
    clip = CLIP(TEXT, VISION)
    ids, image = torch.tensor([[18, 1, 19]]), torch.randn(1, 3, 8, 8)
    expected = clip(ids, image)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close([v.float() for v in clip(ids, image)], list(expected), atol=0.05, rtol=0.05)
    clip.double()
    torch.testing.assert_close([v.float() for v in clip(ids, image.double())], list(expected), atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(clip.encode_image, image.double().requires_grad_())

"""CLIP's towers: causality, pooling, initialization, configs."""
import pytest
import torch

from minidiff.nets.clip import CLIPText, CLIPTextConfig

pytestmark = pytest.mark.quick
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "projection_dim": 8}
TEXT = CLIPTextConfig(vocab_size=20, eos_token_id=19, **SHAPE)


def test_a_token_sees_only_itself_and_those_before_it():
    net = CLIPText(TEXT).eval()
    ids = torch.tensor([[18, 3, 4, 5, 19]])
    other = torch.tensor([[18, 3, 4, 6, 19]])
    a, b = net(ids)[0], net(other)[0]
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:], atol=1e-3)


def test_pooled_is_the_first_end_of_text_whatever_follows():
    net = CLIPText(CLIPTextConfig.from_dict({**TEXT.to_dict(), "architectures": ["CLIPTextModelWithProjection"]}))
    a, b = net(torch.tensor([[18, 3, 19, 19]]))[1], net(torch.tensor([[18, 3, 19, 7]]))[1]
    assert a.shape == (1, 8)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("skip", [-1, 2])
def test_clip_skip_out_of_range_is_an_error(skip):
    with pytest.raises(ValueError, match=f"clip_skip is {skip}, but the text encoder has 2 layers"):
        CLIPText(TEXT)(torch.tensor([[18, 19]]), skip)


def test_a_fresh_residual_stream_has_the_published_scale():
    torch.manual_seed(0)
    net = CLIPText(CLIPTextConfig(vocab_size=500, hidden_size=256, num_attention_heads=4, num_hidden_layers=8))
    layer = net.text_model.encoder.layers[0]
    for weight, std in ((layer.self_attn.q_proj.weight, 256 ** -0.5), (layer.mlp.fc1.weight, 512 ** -0.5),
                        (layer.self_attn.out_proj.weight, 256 ** -0.5 / 4), (layer.mlp.fc2.weight, 256 ** -0.5 / 4),
                        (net.text_model.embeddings.token_embedding.weight, 0.02)):
        assert abs(weight.std().item() / std - 1) < 0.03
    assert torch.equal(net.text_model.final_layer_norm.weight, torch.ones(256))


def test_architectures_of_another_type_name_none_and_a_width_of_0_is_named():
    assert not CLIPTextConfig.from_dict({"architectures": 5}).with_projection
    with pytest.raises(ValueError, match="8 heads do not divide the width 0"):
        CLIPTextConfig.from_dict({"hidden_size": 0})

"""Diffusion transformers: the table of the paper, their start, prompts, positions. Equality: tests/parity."""
import pytest
import torch

from minidiff.guidance import cfg
from minidiff.nets.attention import watched
from minidiff.nets.dit import DiT, DiTConfig, positions, unpatched

pytestmark = pytest.mark.quick

TOLD = DiTConfig(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=None,
                 cross_attention_dim=6)


def drawn(config):
    """A net with all its weights drawn: as it begins, it answers 0."""
    torch.manual_seed(0)
    net = DiT(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize(("heads", "width", "depth", "parameters"), [
    (6, 384, 12, 32_963_360), (12, 768, 12, 130_512_416), (16, 1024, 24, 458_102_816), (16, 1152, 28, 675_129_632)])
def test_the_paper_s_networks_have_their_parameters(heads, width, depth, parameters):
    """Those of its code, in which the table of 256 positions counts as a parameter that does not learn."""
    with torch.device("meta"):
        net = DiT(DiTConfig(num_attention_heads=heads, attention_head_dim=width // heads, num_layers=depth,
                            out_channels=8))
    assert sum(p.numel() for p in net.parameters()) + 256 * width == parameters


@pytest.mark.parametrize("config", [TOLD, DiTConfig(num_attention_heads=2, attention_head_dim=8, num_layers=2,
                                                    sample_size=8)])
def test_it_begins_with_zero_and_blocks_that_change_nothing(config):
    net, seen = DiT(config), {}
    for i, block in enumerate(net.transformer_blocks):
        block.register_forward_hook(lambda _, given, got, i=i: seen.update({i: (given[0], got)}))
    context = torch.randn(2, 7, 6) if config is TOLD else None
    with torch.no_grad():
        assert not net(torch.randn(2, 4, 8, 8), 500.0, context).any()
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen.values())


def test_positions_are_those_of_the_paper_s_code():
    """Width 8: column first, sines before cosines, frequencies 1 and 1/100."""
    expected = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [.84147, .01, .5403, .99995, 0, 0, 1, 1],
                             [0, 0, 1, 1, .84147, .01, .5403, .99995], [.84147, .01, .5403, .99995] * 2])
    torch.testing.assert_close(positions(2, 2, 8, 2), expected, atol=1e-5, rtol=0)


def test_a_prompt_is_read_and_its_weights_survive_a_folder(tmp_path):
    net = drawn(TOLD)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 6)
    net.save_pretrained(tmp_path)
    with torch.no_grad():
        out = net(x, 500.0, context)
        assert torch.equal(DiT.from_pretrained(tmp_path)(x, 500.0, context), out)
        assert (net(x, 500.0, context.flip(0)) - out).abs().max() > 0.01


def test_several_prompts_for_one_picture_are_rows_of_their_own():
    net, x, context = drawn(TOLD), torch.randn(2, 4, 8, 8), torch.randn(4, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(net(x, 500.0, context), net(torch.cat([x, x]), 500.0, context))


def test_classifier_free_guidance_takes_it_as_a_net():
    net, x, (given, nothing) = drawn(TOLD), torch.randn(2, 4, 8, 8), torch.randn(2, 2, 7, 6)
    with torch.no_grad():
        guided = cfg(net, {"context": given}, {"context": nothing}, 3.0)(x, 500.0)
        torch.testing.assert_close(guided, 3 * net(x, 500.0, given) - 2 * net(x, 500.0, nothing), atol=1e-4, rtol=1e-4)


def test_its_attention_can_be_watched():
    net = drawn(TOLD)
    with torch.no_grad(), watched(net) as maps:
        net(torch.randn(1, 4, 8, 8), 500.0, torch.randn(1, 7, 6))
    assert {name: seen.shape for name, (seen,) in maps.items()} == {
        f"transformer_blocks.{i}.attn{k}": (1, 2, 16, n) for i in (0, 1) for k, n in ((1, 16), (2, 7))}


def test_a_permutation_of_the_patches_is_followed_but_for_their_positions():
    net, x = drawn(TOLD), torch.randn(1, 4, 8, 8)
    net.pos_embed.forward = lambda x: net.pos_embed.proj(x).flatten(2).transpose(1, 2)          # without positions
    context = torch.randn(1, 7, 6)
    with torch.no_grad():
        torch.testing.assert_close(net(x.roll(4, 3), 500.0, context), net(x, 500.0, context).roll(4, 3))


def test_pictures_of_other_sides_have_stretched_positions():
    net = drawn(TOLD)
    with torch.no_grad():
        assert net(torch.randn(1, 4, 12, 8), 500.0, torch.randn(1, 7, 6)).shape == (1, 4, 12, 8)
        with pytest.raises(ValueError, match="do not tile"):
            net(torch.randn(1, 4, 9, 8), 500.0, torch.randn(1, 7, 6))
    torch.testing.assert_close(positions(4, 8, 8, 4)[::2], positions(4, 4, 8, 4))


def test_patches_come_apart_and_together():
    picture = torch.randn(2, 3, 8, 12)
    tokens = picture.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(unpatched(tokens, 2, 3, 4), picture)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"sample_size": 9}, "tile"), ({"num_layers": 0}, "num_layers"), ({"attention_head_dim": 3}, "multiple of 4"),
    ({"norm_type": "layer_norm"}, "norm_type"), ({"activation_fn": "geglu"}, "activation_fn")])
def test_configs_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        DiTConfig.from_dict({"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, **wrong})

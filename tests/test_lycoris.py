"""The relatives of LoRA: each kind of file is its formula in float64, under every spelling, and is taken back."""
import pytest
import torch
from torch.testing import assert_close

from minidiff.io.lycoris import Added, Change, Rescaled, build, fits, strength, tensors
from minidiff.io.weights import save_state
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.fixture
def pipe(tmp_path):
    return tiny.pipeline(tmp_path)


def relatives(weight: torch.Tensor) -> dict[str, tuple[dict, torch.Tensor]]:
    """Of each kind: the parts of a file for this convolution, and the new weight by its formula, in float64."""
    rng = torch.Generator().manual_seed(0)
    out, inputs, k, _ = weight.shape
    W = weight.double()

    def part(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    up, down, mid = part(out, 2), part(2, inputs), part(2, 2, k, k)
    tucker = torch.einsum("oa,abkl,bi->oikl", *(each.double() for each in (up, mid, down)))
    a1, b1, a2, b2 = part(out, 3), part(3, inputs * k * k), part(out, 3), part(3, inputs * k * k)
    loha = ((a1.double() @ b1.double()) * (a2.double() @ b2.double())).view_as(W)
    (t1, c1, d1), (t2, c2, d2) = ((part(3, 3, k, k), part(3, out), part(3, inputs)) for _ in range(2))
    cores = [torch.einsum("abkl,bi,ao->oikl", t.double(), d.double(), c.double())
             for t, c, d in ((t1, c1, d1), (t2, c2, d2))]
    w1, w2 = part(2, 4), part(out // 2, inputs // 4, k, k)
    lokr = torch.kron(w1.double()[..., None, None], w2.double())
    w2a, w2b = part(out // 2, 2), part(2, inputs // 4 * k * k)
    pair = torch.kron(w1.double()[..., None, None], (w2a.double() @ w2b.double()).view(out // 2, inputs // 4, k, k))
    rows, columns, scale, old = part(out), part(inputs), part(out, 1, 1, 1).abs(), part(1, inputs, 1, 1).abs()
    whole = W + 0.5 * (up.double() @ down.double()).view(out, inputs, 1, 1) * torch.ones(k, k)
    wide = torch.stack([torch.stack([down] * k, -1)] * k, -1)
    lora = {"lora_up.weight": up[..., None, None], "lora_down.weight": wide, "alpha": torch.tensor(1.0)}
    return {
        "LoCon with a core": ({"lora_up.weight": up[..., None, None], "lora_down.weight": down[..., None, None],
                               "lora_mid.weight": mid, "alpha": torch.tensor(1.0)}, W + 0.5 * tucker),
        "LoHa": ({"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(6.0)},
                 W + 2 * loha),
        "LoHa with cores": ({"hada_w1_a": c1, "hada_w1_b": d1, "hada_w2_a": c2, "hada_w2_b": d2, "hada_t1": t1,
                             "hada_t2": t2}, W + cores[0] * cores[1]),
        "LoKr": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, W + lokr),     # both whole: no alpha
        "LoKr of a pair": ({"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": torch.tensor(1.0)},
                           W + 0.5 * pair),
        "IA3 of outputs": ({"weight": rows, "on_input": torch.tensor(False)}, W + W * rows.double().view(-1, 1, 1, 1)),
        "IA3 of inputs": ({"weight": columns, "on_input": torch.tensor(True)},
                          W + W * columns.double().view(1, -1, 1, 1)),
        "difference": ({"diff": W.float() / 3}, W + W / 3),
        "DoRA": ({**lora, "dora_scale": scale},
                 scale.double() * whole / whole.flatten(1).norm(dim=1).view(-1, 1, 1, 1)),
        "DoRA of inputs": ({**lora, "dora_scale": old},
                           old.double() * whole / whole.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, 1, 1)),
    }


KINDS = list(relatives(torch.zeros(4, 16, 3, 3)))


@pytest.mark.parametrize("prefix", ["lora_unet_conv_out.", "lycoris_conv_out.", "diffusion_model.out.2."])
@pytest.mark.parametrize("kind", KINDS)
def test_every_relative_is_its_formula(pipe, kind, prefix, tmp_path):
    before = tiny.snapshot(pipe)
    parts, wanted = relatives(pipe.unet.conv_out.weight.detach())[kind]
    save_state({prefix + part: tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    handle = pipe.load_lora(tmp_path / "a.safetensors")
    assert_close(pipe.unet.conv_out.weight.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    pipe.unload_lora(handle)
    assert tiny.unchanged(tiny.snapshot(pipe), before)


def test_differences_of_biases_and_norms_are_added_and_taken_back(pipe, tmp_path):
    before = tiny.snapshot(pipe)
    norm, layer = pipe.unet.down_blocks[0].resnets[0].norm1, pipe.unet.conv_out
    kept = norm.weight.clone(), norm.bias.clone(), layer.bias.clone()
    name = "lora_unet_down_blocks_0_resnets_0_norm1"
    save_state({f"{name}.w_norm": torch.ones(len(kept[0])), f"{name}.b_norm": torch.full_like(kept[1], 2.0),
                "lora_unet_conv_out.diff_b": torch.full((4,), 3.0)}, tmp_path / "a.safetensors")
    handle = pipe.load_lora(tmp_path / "a.safetensors", 0.5)
    for now, was, by in zip((norm.weight, norm.bias, layer.bias), kept, (0.5, 1.0, 1.5)):
        assert_close(now, was + by)
    pipe.unload_lora(handle)
    assert tiny.unchanged(tiny.snapshot(pipe), before)


def test_what_lacks_a_part_or_has_one_too_many_is_no_change():
    whole = {"hada_w1_a": torch.ones(2, 1), "hada_w1_b": torch.ones(1, 3), "hada_w2_a": torch.ones(2, 1),
             "hada_w2_b": torch.ones(1, 3)}
    assert build(whole, lambda rank: 1.0) is not None
    for wrong in ({k: v for k, v in whole.items() if k != "hada_w2_b"}, whole | {"hada_t1": torch.ones(1, 1, 3, 3)},
                  whole | {"up": torch.ones(2, 1)}, {"dora_scale": torch.ones(2)}, {},
                  {"diff": torch.ones(2), "dora_scale": torch.ones(2)}, {"lokr_w1": torch.ones(2, 2)}):
        assert build(wrong, lambda rank: 1.0) is None


def test_a_change_says_its_tensors_its_strength_and_whether_it_fits():
    dora = Rescaled(Change(torch.ones(1, 2), torch.ones(3, 1), 0.25), torch.ones(3))
    assert len(tensors(dora)) == 3 and strength(dora) == 0.25 and strength(Added(torch.ones(2))) == 1.0
    assert fits(dora, torch.ones(3, 2)) and not fits(dora, torch.ones(2, 3))

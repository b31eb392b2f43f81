"""`bench`: it counts what a step costs and compares like with like; how fast it is, no test asks."""
import json

import pytest
import torch

from minidiff import cli
from minidiff.io.checkpoint import FAMILIES
from minidiff.measure import bench
from minidiff.nets.unet import UNet, UNetConfig

XL = {"sample_size": 8, "block_out_channels": [8, 16], "norm_num_groups": 4, "cross_attention_dim": 24,
      "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 2], "use_linear_projection": True,
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
      "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def test_a_forward_of_stable_diffusion_1_costs_0_803_teraflop():
    config = UNetConfig.from_dict(FAMILIES["sd1"]["unet"])
    assert bench._flops(config, 1, 64) / 1e12 == pytest.approx(0.803, abs=5e-4)  # facts measured on the reference


@torch.inference_mode()
@pytest.mark.parametrize("config", [UNetConfig.from_dict(XL)], ids=["SDXL"])
def test_both_sides_compute_the_same(config):
    unet = UNet(config).eval()
    x, t, context, vec = inputs = bench._inputs(config, 2, 8, "cpu", torch.float32)
    torch.testing.assert_close(bench._diffusers(unet)(*inputs), unet(x, t, context, vec=vec), rtol=1e-4, atol=1e-5)


def test_the_command_prints_and_writes_every_number(tmp_path, capsys):
    file = tmp_path / "bench.json"
    threads = str(torch.get_num_threads())  # as before: the setting outlives the command
    assert cli.main(["bench", "--steps", "1", "--pairs", "2", "--threads", threads, "--json", str(file)]) == 0
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    first, *lines = printed.splitlines()
    assert first == f"mini-sd, 1 × 128×128 pixels, float32, on {result['device']}"
    assert [line[2:19].strip() for line in lines] == ["a guided step", "arithmetic", "a picture", "memory at most",
                                                      "beside diffusers"][:5 if result["peak_bytes"] else 4]
    assert f"{1000 * result['step_seconds']:.3g} ms" in lines[0] and "of 1 steps" in lines[2]
    assert cli._time(0.01667), cli._time(2.345) == ("16.7 ms", "2.35 s")
    median, low, high = result["ratio"]
    assert result["peak_bytes"] is None or result["peak_bytes"] > 2**27           # no less than torch itself
    assert 0 < low <= median <= high and result["picture_seconds"] > 0 and result["size"] > 0
    assert result["share"] == pytest.approx(result["tflops"] / result["matmul_tflops"])


@pytest.mark.parametrize("arguments, sentence", [
    (["--dtype", "int8"], "it should be float32, float16 or bfloat16"), (["nowhere"], "nowhere"),
    (["--batch", "0"], "batch is 0; it must be a whole number from 1"), (["--threads", "5000"], "from 1 to 4096"),
    (["--size", "1"], "height is 1; it must be a positive multiple of 8"), (["--size", "0"], "height is 0"),
    (["--size", "1000000"], "GiB are free on cpu; what helps"), (["sd1", "--batch", "99999"], "GiB are free on cpu"),
    (["--device", "gpu"], "there is no device 'gpu' here")])
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1

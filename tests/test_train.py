"""The training loop: resumed = uninterrupted, checkpoints that survive a kill, averages, losses, data order."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.io.weights import load_state
from minidiff.schedule import SD
from minidiff.train import losses
from minidiff.train.ema import EMA
from minidiff.train.trainer import Run, batch_indices, generator, learning_rate, train

ROOT = Path(__file__).resolve().parents[1]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(model, step, share):
    x = torch.randn(16, 4, generator=generator(0, step))[share]
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}


def fit(out, steps=120, objective=loss, **options):
    return train("toy", net(), objective, Run(out, steps, device="cpu", **options), batch=16, lr=1e-2)


def weights(module):
    return torch.cat([p.flatten() for p in module.parameters()])


def test_training_beats_the_trivial_predictor(tmp_path):
    average = fit(tmp_path, 600)
    x = torch.randn(256, 4, generator=generator(1))
    assert (average(x) - x.sum(1, keepdim=True)).square().mean() < 0.3 * x.sum(1).var()


def test_resume_is_bit_identical(tmp_path):
    whole = weights(fit(tmp_path / "whole"))

    def killed(model, step, share):
        if step == 75:
            raise KeyboardInterrupt
        return loss(model, step, share)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=killed)
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)


def test_resume_skips_a_damaged_checkpoint(tmp_path):
    whole = weights(fit(tmp_path / "whole"))
    fit(tmp_path / "cut", 120, seconds=1e-9)  # stops before the first step, at step 0

    def killed(model, step, share):
        if step == 60:
            raise KeyboardInterrupt
        return loss(model, step, share)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", objective=killed, resume=True)
    newest = sorted((tmp_path / "cut/train/toy").glob("step-*"))[-1]
    data = bytearray((newest / "net.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "net.safetensors").write_bytes(bytes(data))
    assert torch.equal(weights(fit(tmp_path / "cut", resume=True)), whole)


SCRIPT = """
import sys
from pathlib import Path
from tests.test_train import fit
fit(Path(sys.argv[1]), 60)
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Each process has half of every batch; the gradients are averaged."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*command, str(tmp_path / "script.py"), str(tmp_path / "two")],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    fit(tmp_path / "one", 60)
    one, two = (load_state(tmp_path / name / "train/toy/step-0000060/ema.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=5e-4, rtol=0.0)  # half a batch alone is 1e-2 away; bf16 rounds
    logs = [json.loads((tmp_path / name / "logs/toy.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)  # the mean over the processes


def test_resume_without_a_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        fit(tmp_path, resume=True)


def test_a_run_is_never_overwritten(tmp_path):
    fit(tmp_path, 10)
    with pytest.raises(ValueError, match="holds a run already; --resume continues it"):
        fit(tmp_path, 10)


def test_log_has_one_line_per_fifty_steps_also_after_a_resume(tmp_path):
    fit(tmp_path, 120, seconds=1e-9)
    fit(tmp_path, 120, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "logs/toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 120]
    assert rows[-1]["images"] == 120 * 16 and rows[-1]["loss"] < rows[0]["loss"]


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="not finite at step 50"):
        fit(tmp_path, objective=lambda model, step, share: {"loss": model(torch.ones(1, 4)).sum() * math.inf})


@pytest.mark.parametrize("options, sentence", [({"steps": 0}, "at least 1 step"),
                                               ({"steps": 5, "seconds": 0.0}, "must be positive")])
def test_run_rejects(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Run(tmp_path, **options)


@pytest.mark.quick
def test_every_epoch_sees_every_example_once_in_a_new_order():
    epochs = [torch.cat([batch_indices(12, 4, step) for step in range(3 * e, 3 * e + 3)]) for e in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(12)) for epoch in epochs)
    assert not torch.equal(*epochs)
    with pytest.raises(ValueError, match="fewer than one batch"):
        batch_indices(3, 4, 0)


@pytest.mark.quick
def test_ema_of_a_constant_net_is_that_net_and_the_decay_rises():
    model = nn.Linear(2, 1)
    average = EMA(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.net.weight.fill_(0.0)
    for _ in range(3):
        average.update(model)
    # 1 − Π d_n with d_n = (1 + n)/(10 + n): 1 − (1·2·3)/(10·11·12)
    torch.testing.assert_close(average.net.weight, torch.full((1, 2), 1 - 6 / 1320))


@pytest.mark.quick
def test_learning_rate_warms_up_holds_and_decays_to_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == 2.0 == rates[500] and rates[-1] < 0.01


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_diffusion_loss_of_the_perfect_net_is_zero(kind):
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in SD(t))
    perfect = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[kind]

    def model(x, t):
        torch.testing.assert_close(x, alpha * x0 + sigma * eps)
        return perfect

    torch.testing.assert_close(losses.diffusion(model, kind, SD, x0, t, eps), torch.zeros(3))


@pytest.mark.quick
def test_kl_term_equals_torch_distributions():
    mean, logvar, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.zeros(2, 3, 6, 6)
    truth = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                              torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.vae(x, x, mean, logvar, kl=1.0), truth)


@pytest.mark.quick
def test_contrastive_loss_is_low_for_matches_and_high_for_a_shuffle():
    v, scale = torch.eye(8), torch.tensor(3.0)
    assert losses.contrastive(v, v, scale) < 0.1 < 1.0 < losses.contrastive(v, v.roll(1, 0), scale)

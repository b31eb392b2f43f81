"""The training loop: losses, logs, data order, learning rate, several processes."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidiff.io.weights import load_state
from minidiff.train import trainer
from minidiff.train.trainer import Run, batch_indices, generator, learning_rate
from tests.toy import fit

ROOT = Path(__file__).resolve().parents[1]


def test_training_beats_the_trivial_predictor(tmp_path):
    average = fit(tmp_path, 600)
    x = torch.randn(256, 4, generator=generator(1))
    assert (average(x) - x.sum(1, keepdim=True)).square().mean() < 0.3 * x.sum(1).var()


SCRIPT = """
import sys
from pathlib import Path
from minidiff.train import trainer
from tests.toy import fit
trainer.precision = lambda device: "no"
fit(Path(sys.argv[1]), 60)
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Each process has half of every batch; the gradients are averaged. In float32, also where bf16 is native."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run([sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / name)],
                              capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    one, two = (load_state(tmp_path / name / "train/toy/step-0000060/ema.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0.0)  # half a batch alone is 1e-2 away
    logs = [json.loads((tmp_path / name / "logs/toy.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)  # the mean over the processes


@pytest.fixture
def float32(monkeypatch):
    """Also where bf16 is native."""
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(trainer, "precision", lambda device: "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.quick
@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_is_the_batch(tmp_path, parts, float32):
    whole = fit(tmp_path / "whole", 40).state_dict()
    split = fit(tmp_path / "parts", 40, accumulate=parts).state_dict()
    for key, weight in whole.items():                     # 3 does not divide 16: the parts count by their size
        torch.testing.assert_close(split[key], weight, atol=1e-5, rtol=0.0)
    logs = [json.loads((tmp_path / name / "logs/toy.jsonl").read_text()) for name in ("whole", "parts")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)


def test_a_part_has_at_least_one_example(tmp_path):
    with pytest.raises(ValueError, match="accumulate is 17; each process has 16 of 16 examples"):
        fit(tmp_path, 1, accumulate=17)


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
def test_learning_rate_warms_up_holds_and_decays_to_zero():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == 2.0 == rates[500] and rates[-1] < 0.01

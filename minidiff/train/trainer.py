"""One training loop for every recipe, on accelerate: resumable bit for bit, averaged, logged, with pictures."""
from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.device import default_device, find_device
from minidiff.io.images import save_image
from minidiff.io.plain_text import parse
from minidiff.io.write import append, write_atomic
from minidiff.sd.settings import SEEDS
from minidiff.train.ema import EMA
from minidiff.train.resume import check, resume, save_checkpoint
from minidiff.values import number, whole


@dataclass(frozen=True)
class Run:
    """Where and how long to train; the options of `python -m minidiff train`.

    Args:
        out: the folder of the model; the run's own files go to out/train/NAME, its log to out/logs/NAME.jsonl.
        steps: optimizer steps in all (also when resumed).
        seconds: stop earlier, after so much time in this process; the checkpoint continues with `resume`.
        device: None means cuda, else mps, else cpu.
        threads: torch threads; None leaves them alone.
        resume: continue from the newest whole checkpoint.
        batch: examples per step; `recipes.run` puts the recipe's own number in place of None.
        accumulate: in how many parts a step's batch passes, one after the other, which takes less memory; gradients are
            those of the whole, where a loss is a mean over it.
        save_every: seconds between checkpoints (and sample pictures).
        seed: of weights, data order and noise, below 2³².
        made: what else the result depends on, by name: numbers, or digests under names such as "another vocabulary";
            checkpoints keep it, and a run resumes only with the same.

    Raises:
        ValueError: a value out of range, or a device that is not here.

    >>> Run(Path("runs/mini-sd"), steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; training takes at least 1 step, and a whole number of them
    """

    out: Path
    steps: int
    seconds: float | None = None
    device: str | None = None
    threads: int | None = None
    resume: bool = False
    batch: int | None = None
    save_every: float = 120.0
    seed: int = 0
    accumulate: int = 1
    made: dict[str, int | str | None] = field(default_factory=dict)

    def __post_init__(self):
        text = f"steps is {self.steps}; training takes at least 1 step, and a whole number of them"
        object.__setattr__(self, "steps", whole("steps", self.steps, 1, 10**9, text))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, SEEDS - 1))
        if self.seconds is not None and not number("seconds", self.seconds) > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be positive")
        if self.batch is not None:
            object.__setattr__(self, "batch", whole("batch", self.batch, 1, 2**20))
        text = f"accumulate is {self.accumulate}; a batch has at least 1 part, and at most one for each example"
        most = self.batch or 2**20
        object.__setattr__(self, "accumulate", whole("accumulate", self.accumulate, 1, most, text))
        if self.threads is not None:
            object.__setattr__(self, "threads", whole("threads", self.threads, 1, 4096))
        if self.device is not None:
            find_device(self.device)


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone, so that step n draws the same noise in every run.

    >>> torch.equal(torch.randn(2, generator=generator(0, 7)), torch.randn(2, generator=generator(0, 7)))
    True
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def digest(*folders: Path) -> str:
    """sha256 of the names and contents of the files in folders."""
    whole = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.glob("*") if file.is_file()):
        whole.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def batch_indices(n: int, batch: int, step: int, seed: int = 0) -> Tensor:
    """Which of n examples step number `step` sees: every epoch is a fresh permutation, the odd rest is dropped.

    Args:
        n: number of examples, at least `batch`.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: there are fewer examples than that.

    >>> seen = torch.cat([batch_indices(6, 2, step) for step in range(3)]); seen.sort().values.tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if n < batch:
        raise ValueError(f"{n} examples are fewer than one batch of {batch}; training needs at least one batch")
    epoch, place = divmod(step, n // batch)
    return torch.randperm(n, generator=generator(seed, epoch))[place * batch:(place + 1) * batch]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200, decay: float = 0.3) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last share `decay` of the steps.

    >>> [learning_rate(step, 1000, 1.0) for step in (99, 500, 850)]
    [0.5, 1.0, 0.5]
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def precision(device: str) -> str:
    """"bf16" where it is fast (CUDA, CPUs with AVX512-BF16), else "no": on AVX2 it is 130 times slower."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # torch has no public name for it
    return "bf16" if device == "cuda" or (device == "cpu" and native()) else "no"


class Objective(nn.Module):
    """The loss as a module around the net, so that accelerate's autocast and data parallelism cover all of it."""

    def __init__(self, net: nn.Module, loss: Callable):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, step: int, share: slice) -> dict[str, Tensor]:
        """What the loss says of this share of a step's batch."""
        return self.loss(self.net, step, share)


def train(name: str, net: nn.Module, loss: Callable[[nn.Module, int, slice], dict[str, Tensor]], run: Run, *,
          batch: int, lr: float, ema: float | Callable[[int], float] = 0.999, weight_decay: float = 0.01,
          clip: float = 1.0, sample: Callable | None = None) -> nn.Module:
    """Minimise loss(net, step, share)["loss"] with AdamW and return the averaged net.

    Everything random is a function of (seed, step), so net, average, optimizer and step number are the whole state:
    a killed run that resumes ends in the same bits (test_resume_is_bit_identical) for the same number of threads.
    Several processes average their gradients, which is the gradient of the whole batch where the loss is a mean over
    it; what a recipe draws for its share is other noise than in one process, and clip compares within a share.

    Args:
        name: of the recipe: names the log and the run's folder.
        loss: called with the net, the step number and this process's slice of the batch; returns a dictionary of
            scalars, of which "loss" is minimised and all are logged.
        batch: examples per step over all processes. lr: peak learning rate. clip: largest gradient norm.
        ema: decay of the average, or a function updates so far -> decay, as those of `minidiff.train.ema`.
        sample: averaged net -> PIL picture, drawn at every checkpoint.

    Raises:
        ValueError: what `check` and `resume` say; the loss became NaN or infinite; more parts than examples.
        KeyboardInterrupt: Ctrl-C, or `Terminated`, SIGTERM, came: raised behind the step at work and a checkpoint.
        OSError: a file cannot be written; it is named.
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    if run.threads:
        torch.set_num_threads(run.threads)
    device = run.device or default_device()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision(device))
    work, log = Path(run.out) / "train" / name, Path(run.out) / "logs" / f"{name}.jsonl"
    check(work, run.made, run.resume)
    average = EMA(net.to(accelerator.device), ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    how = {"threads": torch.get_num_threads(), "processes": accelerator.num_processes,
           "precision": accelerator.mixed_precision}
    begun = resume(work, net, average, optimizer, how) if run.resume else {"step": 0, "seconds": 0.0}
    step, spent = begun["step"], begun["seconds"]
    main = accelerator.is_main_process
    if main:
        keep = log.read_text(errors="replace").splitlines() if run.resume and log.is_file() else []
        write_atomic(log, "".join(f"{line}\n" for line in keep if _logged(line) <= step))  # later steps run again
    objective, optimizer = accelerator.prepare(Objective(net, loss), optimizer)
    size = batch // accelerator.num_processes
    if run.accumulate > size:
        raise ValueError(f"accumulate is {run.accumulate}; each process has {size} of {batch} examples, and a part "
                         "needs at least one")
    ends = [accelerator.process_index * size + size * k // run.accumulate for k in range(run.accumulate + 1)]
    shares = [slice(*pair) for pair in itertools.pairwise(ends)]
    began = saved = time.monotonic()
    # what the next line of the log is the mean of
    sums = {key: torch.tensor(value, device=accelerator.device) for key, value in begun.get("sums", {}).items()}
    summed = begun.get("summed", 0)
    bar = tqdm(total=run.steps, initial=step, desc=name, unit="step", disable=not main, mininterval=0.5)

    def over() -> bool:
        """Whether to stop before the end: all processes or none."""
        now = bool(asked) or run.seconds is not None and time.monotonic() - began >= run.seconds
        if accelerator.num_processes == 1:
            return now
        return bool(accelerator.reduce(torch.tensor(float(now), device=accelerator.device), "sum"))

    def means(n: int) -> dict[str, float]:
        """The sums over n and all processes; ValueError before a log or a checkpoint is made of what is not finite."""
        found = {key: float(value) for key, value in accelerator.reduce(
            {key: value / n for key, value in sums.items()}, "mean").items()}
        if not all(map(math.isfinite, found.values())):
            raise ValueError(f"{name}: the loss is not finite at step {step} ({found}); "
                             "another learning rate or other data may help, the same steps again do not")
        return found

    def checkpoint(rest: dict[str, float]) -> None:
        if main:
            manifest = {"step": step, "seconds": spent + time.monotonic() - began, "made": run.made, "how": how,
                        "sums": rest, "summed": summed}
            save_checkpoint(work, net, average, optimizer, manifest)
            if sample:
                save_image(sample(average.net), work / "samples" / f"{step:07d}.png")

    with stopping() as asked, bar:
        while step < run.steps and not over():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, lr)
            values: dict[str, Tensor] = {}
            for share in shares:
                part, weight = objective(step, share), (share.stop - share.start) / size
                accelerator.backward(part["loss"] * weight)
                for key, value in part.items():
                    values[key] = values.get(key, 0.0) + weight * value.detach()
            norm = accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(net)
            step, summed = step + 1, summed + 1
            for key, value in {**values, "grad_norm": norm}.items():
                sums[key] = sums.get(key, 0.0) + value             # tensors: to read one is to wait for the device
            bar.update()
            if step % 50 == 0 or step == run.steps:
                row = {key: round(value, 6) for key, value in means(summed).items()}
                sums, summed = {}, 0
                if main:
                    seconds = round(spent + time.monotonic() - began, 1)
                    append(log, json.dumps({"step": step, "images": step * batch, "seconds": seconds, **row}) + "\n")
                    bar.set_postfix(loss=f"{row['loss']:.4f}")
                if time.monotonic() - saved > run.save_every:
                    checkpoint({})
                    saved = time.monotonic()
        checkpoint(means(1))
    if asked:
        text = f"{name} stopped at step {step}; --resume continues it"
        raise Terminated(text) if signal.SIGTERM in asked else KeyboardInterrupt(text)
    return average.net


class Terminated(KeyboardInterrupt):
    """SIGTERM, which the schedulers of clusters send, came while a run was at work."""

    code = 128 + signal.SIGTERM


@contextmanager
def stopping() -> Iterator[list[int]]:
    """The signals SIGINT (Ctrl-C) and SIGTERM are noted in the list, so that no step is left half made.

    Outside the main thread nothing can be noted.

    Raises:
        KeyboardInterrupt: a second one came: at once.

    >>> with stopping() as asked:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> asked == [signal.SIGTERM]
    True
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _logged(line: str) -> float:
    """The step of a line of a log; of a line that was never finished, infinity."""
    try:
        return float(parse(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf

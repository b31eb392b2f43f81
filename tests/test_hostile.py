"""Whatever a file holds, opening it gives a sentence or what is asked for: no code runs, no traceback, no wait."""
import resource
import signal
import time

import pytest

from minidiff.io.plain_text import one_line
from tests import hostile, tiny

SECONDS, BYTES = 20.0, 2 * 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline(folder / "tokenizer").save_pretrained(folder)
    return folder


def peak() -> int:
    """Bytes of memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def opened(call) -> str:
    """What came of it: "accepted", "a sentence", or what should not have."""
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call()
        return "accepted"
    except TimeoutError:
        return f"over {SECONDS:.0f} s"
    except (ValueError, OSError) as error:
        line = one_line(error)
        return "a sentence" if line and line.isprintable() else f"no sentence: {error!r}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_hostile_file_gets_no_further_than_a_sentence(tmp_path, model, capsys):
    (tmp_path / "corpus").mkdir()
    came, bad, most, began = {}, [], 0, time.monotonic()
    for name, file, call in hostile.corpus(tmp_path / "corpus", model, tmp_path / "sprung"):
        start, size = peak(), file.stat().st_size
        what = opened(call)
        grown = peak() - start
        if grown > max(BYTES, 10 * size):
            what = f"{grown / 2**30:.1f} GiB"
        most = max(most, grown)
        came[what] = came.get(what, 0) + 1
        if what not in ("accepted", "a sentence"):
            bad.append(f"{name}: {what}")
        assert not (tmp_path / "sprung").exists(), name
    print(sum(came.values()), "files:", came, f"at most {most / 2**20:.0f} MiB, {time.monotonic() - began:.0f} s")
    assert not bad, "\n".join(bad[:40])
    assert sum(came.values()) > 1000 and came["a sentence"] > 700

"""How the notebooks run as tests, besides ../conftest.py: this minidiff, and a limit on the CPU time of each."""
import os
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
WARN, LIMIT = 90, 180  # seconds of CPU time, user and system, of a notebook's kernel and its children
CPU = "CPU seconds of the notebook"
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
seconds_of: dict[str, float] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item, nextitem):
    """After a notebook's last cell: how long has its kernel worked?"""
    kernel = getattr(item.parent, "kernel", None)
    if kernel is not None and (nextitem is None or nextitem.parent is not item.parent) and kernel.is_alive():
        used = sum(psutil.Process(kernel.km.provisioner.pid).cpu_times()[:4])
        item.user_properties.append((CPU, used))
        assert used < LIMIT, f"{item.parent.name} takes {used:.0f} s of CPU time; the limit is {LIMIT}"


def pytest_runtest_logreport(report):
    seconds_of.update({report.nodeid.split("::")[0]: value for name, value in report.user_properties if name == CPU})


def pytest_terminal_summary(terminalreporter):
    for name, seconds in sorted(seconds_of.items()):
        warning = f": warning, the aim is {WARN}" if seconds >= WARN else ""
        terminalreporter.write_line(f"{name}: {seconds:.0f} s of CPU time{warning}")

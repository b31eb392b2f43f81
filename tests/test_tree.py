"""The tree of a network's modules: what is printed, and the page that a notebook shows."""
import re

import IPython
import pytest
import torch
from torch import nn

from minidiff.measure.anatomy import anatomy
from minidiff.teach.tree import tree

pytestmark = pytest.mark.quick


@pytest.fixture
def part():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Conv2d(8, 2, 3, padding=1))
    return anatomy(net, torch.zeros(1, 3, 10, 10))


def test_rows_are_indented_as_deep_as_was_asked_for(part, capsys):
    tree(part, "a small net", depth=3, bits=32)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "returns", "parameters", "MB", "GFLOP"] and len(rows) == 5
    assert [len(row) - len(row.lstrip()) for row in rows] == [0, 2, 4, 4, 2]
    assert rows[4].split()[2:] == ["2×10×10", "146", "0.00", "0.000"]
    tree(part, "a small net", depth=1)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_notebook_gets_a_page_with_every_module_and_its_description(part, monkeypatch):
    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    tree(part, "five <modules>", depth=1)
    page = shown[0]["text/html"]
    assert 'aria-label="five &lt;modules&gt;"' in page and shown[0]["text/plain"].startswith("five <modules>")
    assert len(re.findall("Conv2d|ReLU", page)) == 3 and page.count("<details") == 2 and " open" not in page


def test_a_tree_without_words_is_refused(part):
    with pytest.raises(ValueError, match="alt is empty"):
        tree(part, " ")

"""The patients: each differs from the healthy run in what its diagnosis names, and in nothing else."""
import pytest
import torch
from torch import nn

from minidiff.sd.scheduler import preset
from minidiff.teach.patients import Case, patients

pytestmark = pytest.mark.quick


def test_each_patient_has_one_fault():
    nets = {name: nn.Identity() for name in ("net", "raw", "late", "bright", "bright raw")}
    healthy = Case(nets["net"], nets["raw"], torch.rand(2, 3, 4, 4) * 2 - 1, preset("sd-euler", 20))
    seen = []

    def fit(data):
        seen.append(data)
        return nets["bright"], nets["bright raw"]

    cases = patients(healthy, nets["late"], fit)
    assert cases["A"]._replace(grid=healthy.grid) == healthy                     # begins where the noise is half gone
    assert cases["A"].grid[0].sigma < 1.5 < healthy.grid[0].sigma and cases["A"].grid[-1] == healthy.grid[-1]
    assert cases["B"]._replace(net=healthy.net) == healthy and cases["B"].net is nets["late"]
    assert cases["C"].net is nets["bright"] and cases["C"].raw is nets["bright raw"] and cases["C"].grid == healthy.grid
    assert seen[0] is cases["C"].data and seen[0].min() >= 0                      # pictures that were never made −1 … 1

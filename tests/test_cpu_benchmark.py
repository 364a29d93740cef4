"""benchmarks/cpu.py compares networks of the same kind."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cpu  # noqa: E402

from tinyseg import models  # noqa: E402


@pytest.mark.parametrize("name", [name for name in cpu.STEPS if "ResNet-18" in name])
def test_both_sides_have_the_same_kernels(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    backbone, rank, _, _, options = cpu.STEPS[name]
    ours = models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3, **options).state()
    kernels = {n: p.shape for n, p in cpu.torch_network(cpu.STEPS[name]).named_parameters()}
    shapes = {n: a.shape for n, a in ours.items() if "running" not in n}
    assert {n: (*k[2:], k[1], k[0]) if len(k) > 1 else (*k,) for n, k in kernels.items()} == shapes

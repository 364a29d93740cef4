"""benchmarks/cpu.py compares networks of the same kind."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cpu  # noqa: E402

from tinyseg import export, models, no_grad  # noqa: E402


@pytest.mark.parametrize("name", [name for name in cpu.STEPS if "ResNet-18" in name])
def test_both_sides_have_the_same_kernels(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    backbone, rank, _, _, options = cpu.STEPS[name]
    ours = models.resnet_seg(backbone, rank=rank, in_channels=1, classes=3, **options).state()
    kernels = {n: p.shape for n, p in cpu.torch_network(cpu.STEPS[name]).named_parameters()}
    shapes = {n: a.shape for n, a in ours.items() if "running" not in n}
    assert {n: (*k[2:], k[1], k[0]) if len(k) > 1 else (*k,) for n, k in kernels.items()} == shapes


@pytest.mark.parametrize("name", ["ResNet-18 3D", "ResNet-18 3D, U-Net"])
@pytest.mark.parametrize("engine", cpu.ENGINES.values(), ids=cpu.ENGINES)
def test_other_engines_compute_the_same(name, engine):
    for package in ("onnx", engine.__name__):
        pytest.importorskip(package)
    _, rank, _, _, options = cpu.STEPS[name]
    net = models.resnet_seg("resnet18", rank=rank, in_channels=1, classes=3, **options).eval()
    rng, size = np.random.default_rng(0), (34, 39, 65)
    for array in net.statistics():  # as if it had been trained
        array[...] = rng.uniform(0.5, 1.5, array.shape)
    x = rng.standard_normal((1, *size, 1), "float32")
    with no_grad():
        right = net(x).data
    np.testing.assert_allclose(engine(export.onnx(net, size), size, 2)(x), right,
                               atol=1e-4 * abs(right).max())

"""Exported networks answer as ours do: ONNX in another runtime, PyTorch's layout in PyTorch."""

import json
import sys

import numpy as np
import pytest
from test_predict import METADATA

import tinyseg as ts
from tinyseg import __main__ as commands
from tinyseg import export, models, ops, pretrained

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def trained(net, seed=0):
    """The network with every number moved away from where it starts, in evaluation mode."""
    rng = np.random.default_rng(seed)
    for _, layer in net.named(ts.nn.BatchNorm):
        layer.running_mean[...] = 0.1 * rng.standard_normal(layer.running_mean.shape)
        layer.running_var[...] = rng.uniform(0.5, 2, layer.running_var.shape)
    for parameter in net.parameters():
        parameter.data += 0.02 * rng.standard_normal(parameter.shape, "float32")
    return net.eval()


def difference(net, size, images=2):
    """Of the runtime's logits from ours, for two images at a time, as a share of the largest."""
    channels = net.config["in_channels"]
    x = np.random.default_rng(1).standard_normal((images, *size, channels), "float32")
    with ts.no_grad():
        ours = net(x).data
    content = export.onnx(net, size).SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs, = session.run(["logits"], {"image": np.ascontiguousarray(np.moveaxis(x, -1, 1))})
    return abs(np.moveaxis(theirs, 1, -1) - ours).max() / abs(ours).max()


@pytest.mark.parametrize("rank, size", [(1, (70,)), (2, (33, 40)), (3, (9, 33, 38))])
@pytest.mark.parametrize("head", ["linear", "fcn", "deeplabv3", "unet"])
def test_onnx_of_every_head_and_rank(head, rank, size):
    net = models.resnet_seg("resnet18", rank=rank, in_channels=2, classes=3, head=head, width=8)
    if rank == 1 and head != "unet":  # the runtime interpolates linearly along two or three axes
        assert export.onnx(trained(net), size).graph.node
    else:
        assert difference(trained(net), size) < 1e-4


@pytest.mark.parametrize("options", [
    {"head": "unet", "norm": "group"}, {"backbone": "resnet50", "head": "unet"},
    {"output_stride": 16, "align_corners": False}, {"head": "unet", "decoder": (16, 8)}])
def test_onnx_of_options(options):
    net = models.resnet_seg(**{"backbone": "resnet18", "rank": 2, "in_channels": 1, "classes": 4,
                               "width": 8} | options)
    net = trained(net)
    assert difference(net, (37, 50)) < 1e-4
    assert difference(ts.infer.fold(net), (37, 50)) < 1e-4


def test_what_is_added_may_be_constant():
    """To a convolution, as to a normalisation; and of a constant alone there is no graph."""
    class Placed(ts.nn.Module):
        config, turned = {"in_channels": 2}, False

        def __init__(self):
            self.conv, self.bn = ts.nn.Conv(2, 5, (3, 3), padding=1, rng=0), ts.nn.BatchNorm(5)
            self.a, self.b = (ts.Tensor(np.random.default_rng(seed).standard_normal(
                (1, 8, 11, 5), "float32"), requires_grad=True) for seed in (1, 2))

        def forward(self, x):
            y = self.conv(x, None, self.a, relu=True)
            return self.bn(self.b, y) if self.turned else self.bn(y, self.b)

    net = Placed().eval()
    assert difference(net, (8, 11), images=1) < 1e-5
    net.turned = True
    with pytest.raises(ValueError, match="batch_norm of a constant has no form"):
        export.onnx(net, (8, 11))


def test_onnx_of_a_classifier():
    net = trained(models.resnet("resnet18", rank=2, in_channels=3, classes=5))
    assert difference(net, (40, 33)) < 1e-4


@pytest.mark.parametrize("profile", ts.PROFILES)
def test_onnx_of_every_way_along_depth(profile):
    flat = models.resnet_seg("resnet50" if profile == "pointwise" else "resnet18", rank=2,
                             in_channels=1, classes=3, width=8)
    net = ts.inflate(flat, profile=profile, depth_stride=(1, 1, 2))
    assert difference(trained(net), (7, 33, 34)) < 1e-3  # gates make rounding larger, ours too


def test_a_matrix_multiplies_channels_of_maps():
    net = ts.nn.Sequential(ts.nn.Conv(2, 5, (3, 3), rng=0), ts.nn.Linear(5, 4, rng=1))
    net.config = {"in_channels": 2}
    assert difference(net, (8, 11)) < 1e-5
    w = ts.Tensor(np.ones((6, 2), "float32"))
    for forward, said in ((lambda x: w @ x, "expected x @ a constant matrix"),
                          (lambda x: x @ (2 * x), "expected x @ a constant matrix"),
                          (lambda x: x[:, ::-1], "slices forwards")):
        net.forward = forward
        with pytest.raises(ValueError, match=said):
            export.onnx(net, (4, 2))


def test_a_network_that_is_written_stays_as_it_was(tmp_path):
    net = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=4)
    loss = net(np.ones((2, 32, 40, 1), "float32")).sum()
    net.conv1.weight.grad = np.ones_like(net.conv1.weight.data)
    for name in ("net.onnx", "net.safetensors"):
        export.write(tmp_path / name, net, (32, 40))
    assert net.training and (net.conv1.weight.grad == 1).all()
    loss.backward()  # nothing that it needs was touched


def test_an_operation_without_an_operator_is_named():
    class Odd(ts.nn.Conv):
        def forward(self, x):
            return ops.clip(super().forward(x), low=0.0)

    net = Odd(1, 2, (3, 3), rng=0)
    net.config = {"in_channels": 1}
    with pytest.raises(ValueError, match="operation clip has no form in ONNX.*conv, "):
        export.onnx(net, (8, 9))
    Odd.forward = lambda self, x: ts.nn.Conv.forward(self, x)[:, 0]
    with pytest.raises(ValueError, match="expected slices"):
        export.onnx(net, (8, 9))


def test_what_goes_with_the_graph(tmp_path):
    net = trained(models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8))
    export.write(tmp_path / "net.onnx", net, (40, 48), labels={"1": "pancreas"})
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["metadata"]) == {"labels": {"1": "pancreas"}}
    assert json.loads(told["config"])["model"] == "resnet_seg"
    assert [(x.name, x.shape) for x in (*session.get_inputs(), *session.get_outputs())] == [
        ("image", ["N", 1, 40, 48]), ("logits", ["N", 3, 40, 48])]
    assert all(p.requires_grad for p in net.parameters())  # the network is left as it was


@pytest.mark.parametrize("rank, options", [(2, {}), (3, {}), (
    2, {"head": "unet", "decoder": (32, 16), "norm": "group"})])
def test_pytorch_takes_what_is_written(tmp_path, rank, options):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch_models import Net, twin

    net = trained(models.resnet_seg("resnet18", rank=rank, in_channels=1, classes=3, **options))
    export.write(tmp_path / "net.safetensors", net)
    state = load_file(tmp_path / "net.safetensors")
    reference = twin(net)
    fresh = Net("resnet18", rank, 1, 3, **options | {"output_stride": net.config["output_stride"]})
    counters = {n for n in fresh.state_dict() if n.endswith("num_batches_tracked")}
    assert state.keys() == fresh.state_dict().keys() - counters
    fresh.load_state_dict(state, strict=False)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_the_way_back(tmp_path):
    net = trained(models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3))
    export.write(tmp_path / "net.safetensors", net)
    again = models.build(pretrained.recognise(pretrained.read(tmp_path / "net.safetensors")))
    pretrained.load(again, tmp_path / "net.safetensors")
    for name, array in net.state().items():
        assert np.array_equal(again.state()[name], array), name


def test_what_cannot_be_written(tmp_path):
    flat = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8)
    with pytest.raises(ValueError, match="ends in .onnx or .safetensors"):
        export.write(tmp_path / "net.pth", flat, (32, 32))
    with pytest.raises(ValueError, match="Conv has no config that says in_channels"):
        export.write(tmp_path / "net.onnx", ts.nn.Conv(1, 2, (3, 3), rng=0), (8, 8))
    with pytest.raises(ValueError, match="conv1 computes along depth by Factored"):
        export.write(tmp_path / "net.safetensors", ts.inflate(flat, profile="factored"))
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys, monkeypatch):
    net = trained(models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3, width=8))
    ts.save(tmp_path / "net.npz", net, **METADATA)

    def run(*words):
        return commands.main(["export", *map(str, words)])

    assert run(tmp_path / "net.npz", tmp_path / "net.onnx") == 0
    assert "written to" in capsys.readouterr().out
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["N", 1, 12, 12]
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["metadata"])["plan"] == METADATA["plan"]
    assert run(tmp_path / "net.npz", tmp_path / "big.onnx", "--size", 64, 48) == 0
    assert run(tmp_path / "net.npz", tmp_path / "net.safetensors") == 0
    capsys.readouterr()
    for source, target, size, said in (("net.npz", "net.pt", (), "ends in .onnx or"),
                                       ("no.npz", "net.onnx", (), "no.npz"),
                                       ("net.npz", "x.onnx", ("--size", 8), "each of the 2")):
        assert run(tmp_path / source, tmp_path / target, *size) == 1
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(tmp_path / "net.npz", tmp_path / "y.onnx") == 1
    assert "pip install" in capsys.readouterr().err


def test_the_main_job_is_a_command(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["train", "--help"])
    assert end.value.code == 0 and "--resume" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        commands.main(["train", "--no-such-option"])
    assert end.value.code == 2 and "--no-such-option" in capsys.readouterr().err

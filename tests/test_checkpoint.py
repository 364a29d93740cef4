"""A file is read back as it was written, or refused with its name; never anything else."""

import io
import json
import os
import stat
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import tinyseg as ts
from tinyseg import checkpoint

NUMBERS = np.random.default_rng(0).standard_normal
ARRAYS = {"a.weight": NUMBERS((3, 2)), "b": NUMBERS(5).astype("float32"), "steps": np.array(7)}
STATE = {"fc.bias": np.zeros(3, "float32")}
RIGHT = {"model": "resnet_seg", "backbone": "resnet18", "rank": 2, "in_channels": 1, "classes": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here outlives a power cut: do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def refused(path, read=checkpoint.read):
    """read(path) must raise ValueError, naming the file."""
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def make(kind):
    options = {"rank": 3, "depth": 1} if kind == "rank 3" else {"rank": 2}
    net = ts.models.resnet_seg(**options, in_channels=2, classes=3, align_corners=False, seed=3)
    if kind == "classifier":
        net = ts.models.resnet(rank=2, in_channels=2, classes=3)
    if kind == "unet":
        net = ts.models.resnet_seg(**options, in_channels=2, classes=3, head="unet",
                                   decoder=(9, 7, 5), norm="group")
        net = ts.inflate(net, (1, 2, 2, 1, 2), depth_stride=(1, 2, 1, 2, 1))
    if kind == "inflated":
        net = ts.inflate(net, (5, 2), depth_stride=1)
    if kind == "float64":
        net.astype("float64")
    return net


@pytest.mark.parametrize("kind", ["rank 2", "rank 3", "inflated", "float64", "classifier", "unet"])
def test_a_network_comes_back(tmp_path, kind):
    net, path = make(kind), tmp_path / "net.npz"
    for name, array in net.state().items():
        if "running" in name:
            net.load_state({name: 1 + NUMBERS(array.shape) ** 2}, strict=False)
    ts.save(path, net, spacing=[2.5, 0.8, 0.8], classes={"1": "organ"}, note="ä")
    again = ts.load(path)
    assert again.metadata == {"spacing": [2.5, 0.8, 0.8], "classes": {"1": "organ"}, "note": "ä"}
    state = net.state()
    assert list(again.state()) == list(state) and again.config == net.config
    for name, array in again.state().items():
        assert array.dtype == state[name].dtype
        np.testing.assert_array_equal(array, state[name])
    x = NUMBERS((1, *(3, 17, 21)[-net.config["rank"]:], 2)).astype("float32")
    np.testing.assert_array_equal(again(x).data, net.eval()(x).data)
    assert not again.training and not again.layer1.training
    assert all(p.requires_grad for p in again.parameters())
    assert os.listdir(tmp_path) == ["net.npz"]


def thin(width, rank=2, depth="plane", seed=0, **along):
    """A network of one's own, whose layers are made as a ResNet's."""
    build = ts.models.Builder(rank, ts.models.Depth(depth, **along), seed)
    return ts.nn.Sequential(build.conv(1, width, 3), ts.nn.BatchNorm(width), ts.nn.ReLU(),
                            build.conv(width, 2, 3, bias=True))


def test_a_network_of_ones_own_comes_back(tmp_path, monkeypatch):
    """Built by the maker that its name stands for; without one its file is refused."""
    makers = dict(ts.models.networks.MAKERS)
    monkeypatch.setattr(ts.models.networks, "MAKERS", makers)
    ts.models.register("thin", thin)
    path, net = tmp_path / "net.npz", ts.models.build({"model": "thin", "width": 5, "rank": 2})
    net[3].weight.requires_grad = False
    for net in (net.eval(), ts.inflate(net, (3, 2))):  # noqa: B020
        ts.save(path, net, spacing=[1, 2])
        again = ts.load(path)
        assert again.config == net.config and again.metadata == {"spacing": [1, 2]}
        assert [p.requires_grad for p in again.parameters()] == [True] * 3 + [False, True]
        for name, array in again.state().items():
            np.testing.assert_array_equal(array, net.state()[name])
        x = NUMBERS((1, 4, 7, 9)[-net.config["rank"] - 1:] + (1,)).astype("float32")
        np.testing.assert_array_equal(again(x).data, net(x).data)
    twin = ts.models.build({**net.config, "seed": 1})  # a random start of the inflated network
    assert {n: a.shape for n, a in twin.state().items()} == {
        n: a.shape for n, a in net.state().items()}
    net.config = {"model": "thin", "width": 6}
    with pytest.raises(ValueError, match="would not be read back"):
        ts.save(path, net)
    del makers["thin"]
    assert "'thin'; expected one of resnet_seg, resnet" in refused(path, ts.load)


@pytest.mark.parametrize("name, edit", [
    ("maxpool", lambda net: setattr(net, "maxpool", ts.nn.Identity())),
    ("conv1.window", lambda net: setattr(net.conv1, "window",
                                         ts.windows.Window.of((7, 7), 1, 3))),
    ("layer2.0.bn1.eps", lambda net: setattr(net.layer2[0].bn1, "eps", 0.1)),
    ("bn1.momentum", lambda net: setattr(net.bn1, "momentum", 0.2)),
    ("align_corners", lambda net: setattr(net, "align_corners", True)),
    ("fc", lambda net: setattr(net, "fc", ts.nn.Sequential(net.fc))),
    ("fc.weight", lambda net: setattr(net, "fc", ts.nn.Conv(512, 5, (1, 1), rng=0))),
    ("bn1", lambda net: setattr(net, "bn1", ts.nn.GroupNorm(64))),
    ("extra", lambda net: setattr(net, "extra", ts.nn.Conv(3, 3, (1, 1), rng=0))),
    ("layer2.0.downsample", lambda net: setattr(net.layer2[0], "downsample", None)),
    ("layer3.2", lambda net: setattr(net, "layer3", ts.nn.Sequential(*net.layer3,
                                                                     ts.nn.Identity()))),
    ("layer1.0.conv2.weight", lambda net: setattr(net.layer1[0].conv2, "weight",
                                                  net.layer1[0].conv1.weight)),
    ("layer1.1.bn1.running_mean", lambda net: setattr(net.layer1[1].bn1, "running_mean",
                                                      net.layer1[0].bn1.running_mean)),
    ("bn1.running_mean", lambda net: setattr(net.bn1, "running_mean",
                                             ts.Tensor(net.bn1.running_mean))),
    ("forward", lambda net: setattr(net, "forward", net.features)),
    ("the network", lambda net: setattr(net, "__class__", type("Own", (type(net),), {}))),
])
def test_what_would_be_read_back_otherwise_is_not_saved(tmp_path, name, edit):
    net = make("rank 2")
    edit(net)
    with pytest.raises(ValueError, match=f"would not be read back as it is: {name} is "):
        ts.save(tmp_path / "net.npz", net)
    assert os.listdir(tmp_path) == []


def test_a_network_of_mixed_types_is_not_saved(tmp_path):
    net = make("rank 2")
    net.fc.astype("float64")
    with pytest.raises(ValueError, match="mixes float32 and float64; .*net.astype"):
        ts.save(tmp_path / "net.npz", net)
    assert os.listdir(tmp_path) == []


def test_what_stands_beside_a_network_does_not_keep_it_from_being_saved(tmp_path):
    net = make("rank 2").train(statistics="running")
    net.last = net(np.ones((1, 9, 9, 2)))  # an activation
    net.layer1 = net.layer1[:]  # other objects alike
    net.metadata = {"note": "a"}
    ts.save(tmp_path / "net.npz", net)
    assert ts.load(tmp_path / "net.npz").metadata == {"note": "a"}


def test_frozen_parameters_come_back_frozen(tmp_path):
    net, path = make("inflated"), tmp_path / "net.npz"
    frozen = [f"layer1.{name}" for name, _ in net.layer1.named_parameters()] + ["conv1.weight"]
    for name, p in net.named_parameters():
        p.requires_grad = name not in frozen
    ts.save(path, net)
    ts.save(path, ts.load(path))
    again = ts.load(path)
    assert {name: p.requires_grad for name, p in again.named_parameters()} == {
        name: p.requires_grad for name, p in net.named_parameters()}
    arrays, description = checkpoint.read(path)
    for wrong in (["conv1"], "conv1.weight", 3, None, [[]]):
        checkpoint.write(path, arrays, {**description, "frozen": wrong})
        refused(path, ts.load)


def test_frozen_batch_norms_come_back_frozen(tmp_path):
    net, path = make("rank 2").freeze("layer1").freeze("bn1"), tmp_path / "net.npz"
    net.bn1.unfreeze("bias")
    net.layer2[0].bn1.weight.requires_grad = False  # its statistics move on
    ts.save(path, net)
    again = ts.load(path)
    for one, other in zip(net.modules(), again.modules(), strict=True):
        assert one.frozen == other.frozen == (
            isinstance(one, ts.nn.BatchNorm) and one in [net.bn1, *net.layer1.modules()])
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in net.parameters()]
    assert again.bn1.bias.requires_grad and not again.bn1.weight.requires_grad


def test_files_of_earlier_versions_are_read(tmp_path):
    """They did not say what was frozen."""
    net, path = make("inflated"), tmp_path / "net.npz"
    checkpoint.write(path, net.state(), {"architecture": net.config, "metadata": {"a": 1}})
    again = ts.load(path)
    assert again.metadata == {"a": 1} and all(p.requires_grad for p in again.parameters())
    assert all((array == net.state()[name]).all() for name, array in again.state().items())


def test_numbers_of_numpy_come_back_as_those_of_python(tmp_path):
    path = tmp_path / "net.npz"
    net = ts.models.resnet_seg(rank=np.int64(3), in_channels=np.int32(1), classes=np.uint8(3),
                               output_stride=np.int64(16), align_corners=np.bool_(False),
                               depth=(np.int64(3), 2), depth_stride=np.int64(1),
                               pool_depth=np.int16(2))
    ts.save(path, net, loss=np.float32(0.1), best=[np.int64(3), (np.bool_(True), np.float64(0.5))],
            name=np.str_("a"), none=None)
    again = ts.load(path)
    assert again.metadata == {"loss": float(np.float32(0.1)), "best": [3, [True, 0.5]],
                              "name": "a", "none": None}
    assert {type(x) for x in again.config.values()} == {str, int, bool, tuple}
    assert [(n, m.window) for n, m in again.named(ts.nn.Conv)] == [
        (n, m.window) for n, m in net.named(ts.nn.Conv)]
    ts.save(path, again)  # JSON's lists describe it as tuples did


@pytest.mark.parametrize("metadata, message", [
    ({"labels": {0: "a"}}, "metadata labels has the key 0, expected text, '0'"),
    ({"a": [{"b": {None: 1}}]}, "metadata a 0 b has the key None"),
    ({"spacing": np.ones(3)}, "metadata spacing is a ndarray, expected .*tolist"),
    ({"where": [os]}, "metadata where 0 is a module"),
    ({"x": 1j}, "metadata x is a complex"), ({"x": {1, 2}}, "metadata x is a set"),
])
def test_metadata_that_would_come_back_changed_is_refused(tmp_path, metadata, message):
    with pytest.raises(TypeError, match=message):
        ts.save(tmp_path / "net.npz", make("rank 2"), **metadata)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_training_is_told_from_a_network(tmp_path):
    path = tmp_path / "checkpoint.npz"
    checkpoint.write(path, {f"net/{name}": a for name, a in STATE.items()},
                     {"settings": {}, "stage": "3d", "step": 3, "history": []})
    message = refused(path, ts.load)
    assert "checkpoint of training (stage 3d)" in message and "model_3d.npz" in message


def test_metadata_is_kept_and_renewed(tmp_path):
    path = tmp_path / "net.npz"
    ts.save(path, make("rank 2"), note="a", patch=[3, 4])
    ts.save(path, ts.load(path), note="b")
    assert ts.load(path).metadata == {"note": "b", "patch": [3, 4]}


def test_arrays_come_back(tmp_path):
    path = tmp_path / "any name"
    checkpoint.write(path, ARRAYS, {"step": 3, "rates": [0.1, 1e-300]})
    arrays, description = checkpoint.read(path)
    assert description == {"step": 3, "rates": [0.1, 1e-300]}
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    with np.load(path, allow_pickle=False) as file:  # an ordinary .npz: readable without us
        np.testing.assert_array_equal(file["b"], ARRAYS["b"])


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "short.npz"
    checkpoint.write(path, ARRAYS, {"step": 3})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    """One bit in three of the archive's directory, and one in eleven of the rest."""
    path = tmp_path / "flipped.npz"
    checkpoint.write(path, ARRAYS, {"step": 3})
    whole, (_, description) = path.read_bytes(), checkpoint.read(path)
    directory = 8 * whole.index(b"PK\x01\x02")
    other, changed, harmless = set(), 0, 0
    bits = [*range(0, directory, 11), *range(directory, 8 * len(whole), 3)]
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            arrays, text = checkpoint.read(path)
        except ValueError as error:
            assert str(path) in str(error)
        except Exception as error:
            other.add(type(error).__name__)
        else:  # a date or an attribute: nothing that we read
            same = text == description and list(arrays) == list(ARRAYS) and all(
                np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
            harmless, changed = harmless + same, changed + (not same)
    assert not other and not changed
    assert harmless < len(bits) / 2


def test_a_damaged_shape_is_refused(tmp_path):
    """It reads a part of the array only, which the archive's checksums are not compared with."""
    path = tmp_path / "shape.npz"
    checkpoint.write(path, {"a": NUMBERS((300, 200))}, {})
    whole = path.read_bytes()
    assert whole.count(b"(300, 200)") == 1
    path.write_bytes(whole.replace(b"(300, 200)", b"(100, 200)"))
    with np.load(path) as file:
        assert file["a"].shape == (100, 200)  # NumPy alone is content
    assert "damaged" in refused(path)


def test_what_was_described_otherwise_is_refused(tmp_path):
    """Arrays and description of two files do not make a third."""
    path = tmp_path / "mixed.npz"
    checkpoint.write(path, ARRAYS, {"step": 3})
    with np.load(path) as file:
        content = dict(file)
    for change in ({"b": ARRAYS["b"] + 1}, {"b": ARRAYS["b"].astype("float64")},
                   {"b": ARRAYS["b"][None]},
                   {checkpoint.TEXT: np.frombuffer(
                       content[checkpoint.TEXT].tobytes().replace(b": 3", b": 4"), np.uint8)}):
        with open(path, "wb") as file:
            np.savez(file, **(content | change))
        assert "damaged" in refused(path)
    with open(path, "wb") as file:
        np.savez_compressed(file, **content)  # the same by other means
    assert checkpoint.read(path)[1] == {"step": 3}


def test_files_from_before_there_were_fingerprints_are_read(tmp_path):
    path = tmp_path / "old.npz"
    archive(path, {"format": checkpoint.FORMAT, "arrays": list(ARRAYS), "step": 3}, **ARRAYS)
    arrays, description = checkpoint.read(path)
    assert description == {"step": 3} and list(arrays) == list(ARRAYS)


def test_what_json_changes_does_not_change_the_fingerprint(tmp_path):
    path = tmp_path / "odd.npz"
    arrays = {"t": np.asfortranarray(NUMBERS((3, 4))), "none": np.zeros((0, 3)),
              "text": np.array(["ä", "bc"]), "strided": NUMBERS(9)[::2], "big": np.array(1, ">i4")}
    checkpoint.write(path, arrays, {"labels": {1: "a"}, "size": (1, 2), "x": float("nan")})
    found, description = checkpoint.read(path)
    assert description["labels"] == {"1": "a"} and description["size"] == [1, 2]
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04", b"\x93NUMPY", b"{}" * 5000])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    refused(path)
    refused(path, ts.load)


def test_missing_and_folder(tmp_path):
    for read in (checkpoint.read, ts.load):
        with pytest.raises(FileNotFoundError, match="nothing.npz"):
            read(tmp_path / "nothing.npz")
        refused(tmp_path, read)


def archive(path, description, **arrays):
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    with open(path, "wb") as file:
        np.savez(file, **{checkpoint.TEXT: np.frombuffer(text, np.uint8)}, **arrays)


@pytest.mark.parametrize("description", [
    b"", b"{", b"\xff\xfe", [], 3, None, {}, {"format": "tinyseg 0"}, {"format": None},
    b"[" * 100_000,
])
def test_wrong_descriptions(tmp_path, description):
    path = tmp_path / "described.npz"
    archive(path, description)
    refused(path)


def test_archives_that_are_not_ours(tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, weight=np.ones(3))
    assert "complete tinyseg" in refused(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    refused(tmp_path / "array.npy")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    refused(path)
    archive(path, {"format": checkpoint.FORMAT, "architecture": RIGHT})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("b.txt", "hello")
    refused(path)
    refused(path, ts.load)


class Trap:
    sprung = False

    def __reduce__(self):
        return exec, ("from test_checkpoint import Trap; Trap.sprung = True",)


def test_nothing_in_a_file_is_executed(tmp_path):
    path = tmp_path / "trap.npz"
    archive(path, {"format": checkpoint.FORMAT}, weight=np.array([Trap()], object))
    refused(path)
    refused(path, ts.load)
    assert not Trap.sprung
    with np.load(path, allow_pickle=True) as file:  # the trap works
        file["weight"]
    assert Trap.sprung


def test_an_array_that_claims_to_be_huge(tmp_path):
    path, header = tmp_path / "huge.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    archive(path, {"format": checkpoint.FORMAT})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("weight.npy", header.getvalue())
    refused(path)


@pytest.mark.parametrize("change", [
    {"model": "unet"}, {"model": None}, {"backbone": "resnet19"}, {"backbone": []}, {"rank": 4},
    {"rank": "2"}, {"classes": "three"}, {"classes": None}, {"classes": -1}, {"classes": 2.5},
    {"in_channels": 0}, {"in_channels": 10**14}, {"colour": "red"}, {"output_stride": 7},
    {"depth": {}}, {"head": 3}, {}, {"head": "unet"}, {"model": "os.system"},
    {"model": "tinyseg.models.resnet_seg"}, {"depth_stride": [2, 2, 2]},
])
def test_wrong_architectures(tmp_path, change):
    path = tmp_path / "net.npz"
    checkpoint.write(path, STATE, {"architecture": {**RIGHT, **change}, "metadata": {}})
    refused(path, ts.load)


def test_no_architecture(tmp_path):
    path = tmp_path / "net.npz"
    for architecture in (None, [], "resnet18", 3):
        checkpoint.write(path, STATE, {"architecture": architecture})
        refused(path, ts.load)
    checkpoint.write(path, STATE, {"step": 3})
    refused(path, ts.load)


def test_a_state_that_does_not_fit(tmp_path):
    path, net = tmp_path / "net.npz", make("rank 2")
    state, description = net.state(), {"architecture": net.config, "metadata": {}}
    short = dict(state)
    del short["layer3.1.bn2.running_var"]
    checkpoint.write(path, short, description)
    assert "layer3.1.bn2.running_var is missing" in refused(path, ts.load)
    checkpoint.write(path, {**state, "fc.bias": np.zeros(4, "float32")}, description)
    assert "(2, 3) input channels and classes are claimed, (2, 4) found" in refused(path, ts.load)
    checkpoint.write(path, {**state, "bn1.bias": np.zeros(65, "float32")}, description)
    assert "bn1.bias has shape (65,), expected (64,)" in refused(path, ts.load)
    checkpoint.write(path, {**state, "extra": np.zeros(4, "float32")}, description)
    assert "extra is unexpected" in refused(path, ts.load)
    for dtype in ("int64", "<U7", "complex64"):
        wrong = state["bn1.bias"].astype(dtype)
        checkpoint.write(path, {**state, "bn1.bias": wrong}, description)
        refused(path, ts.load)


def test_a_corrupt_network_file(tmp_path):
    path = tmp_path / "net.npz"
    ts.save(path, make("rank 2"))
    whole = path.read_bytes()
    for place in (len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:place])
        refused(path, ts.load)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        refused(path, ts.load)


@pytest.mark.parametrize("where", ["savez", "fsync", "replace", "interrupt"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, where):
    path = tmp_path / "net.npz"
    checkpoint.write(path, ARRAYS, {"step": 3})
    before = path.read_bytes()

    def partly(file, *arrays, **named):
        file.write(b"PK half a file")
        raise KeyboardInterrupt if where == "interrupt" else OSError("disk full")

    def failing(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if where in ("savez", "interrupt"):
            patch.setattr(np, "savez", partly)
        else:
            patch.setattr(os, where, failing)
        for place in (path, tmp_path / "new.npz"):
            with pytest.raises(KeyboardInterrupt if where == "interrupt" else OSError):
                checkpoint.write(place, {"a": np.ones(3)}, {"step": 4})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.npz"]
    checkpoint.write(path, {"a": np.ones(3)}, {"step": 4})
    assert checkpoint.read(path)[1]["step"] == 4


def test_the_disk_has_the_content_before_the_name_and_the_name_before_write_ends(tmp_path,
                                                                                 monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(
        "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    checkpoint.write(tmp_path / "net.npz", ARRAYS, {})
    assert done == ["file", "replace", "folder"]


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "net.npz"
    own = ts.nn.ReLU()
    own.config = SimpleNamespace(lr=1)
    for net in (ts.nn.ReLU(), own):
        with pytest.raises(ValueError, match="ReLU has no config"):
            ts.save(path, net)
    own.config = {"lr": 1}
    with pytest.raises(ValueError, match="model is None; expected one of resnet_seg, resnet"):
        ts.save(path, own)
    with pytest.raises(TypeError):
        ts.save(path, make("rank 2"), spacing=np.ones(3))
    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path / "no folder" / "net.npz", ARRAYS, {})
    assert os.listdir(tmp_path) == []

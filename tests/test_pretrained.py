"""Foreign checkpoints: every array bit for bit or a refusal; every logit as PyTorch has it."""

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timedelta
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import pretrained
from tinyseg.__main__ import main
from tinyseg.nn import BatchNorm, Conv, ReLU, Sequential
from tinyseg.profiles import PROFILES

try:
    import torch
    from torch_models import Net, segmentation_models_names
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch, the oracle, is not installed")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CT = SHARED / "ct_totalsegmentator_example" / "ts_example_ct_sm.nii.gz"
CIFAR = ("cifar_resnet20-12fca82f.th", "cifar_resnet56-4bfd9763.th")
IMAGENET = {"resnet18": "resnet18_imagenet_ktb_small_blocks.pth",
            "resnet50": "resnet50_imagenet_pqf_large_blocks.pth"}
MB = 1 << 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function from the name of a real weight file to its path, unpacked where needed."""
    folder, unpacked = tmp_path_factory.mktemp("weights"), []

    def find(name):
        source = SHARED / "weights" / name
        if source.exists():
            return source
        packed, path = source.with_name(name + ".gz"), folder / name
        if not packed.exists():
            pytest.skip(f"the real weights {name} are not here")
        if path not in unpacked:
            path.write_bytes(gzip.decompress(packed.read_bytes()))
            unpacked.append(path)
        return path

    yield find
    for path in unpacked:
        path.unlink()


def same(ours, theirs):
    """Same names in the same order, and the same bits, bfloat16 widened."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        tensor = tensor.detach()
        wanted = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        assert ours[name].dtype == wanted.dtype and ours[name].shape == wanted.shape, name
        assert ours[name].tobytes() == wanted.tobytes(), name


def close(a, b, tolerance):
    """Whether a is b up to `tolerance` of b's largest."""
    assert a.shape == b.shape and np.abs(b).max() > 0
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


def forward(model, x):
    """A PyTorch network on a channels-last array, the answer channels last."""
    with torch.no_grad():
        y = model(torch.from_numpy(x).movedim(-1, 1).contiguous())
    return (y.movedim(1, -1) if y.ndim > 2 else y).numpy()


def evaluate(net, x):
    with ts.no_grad():
        return net.eval()(x).data


def refused(path, read=pretrained.read):
    """read(path) must raise ValueError, naming the file; what it says."""
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -- reading ---------------------------------------------------------------------------------------

@needs_torch
@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET.values()])
def test_real_weights_bit_for_bit(weights, name):
    found = torch.load(weights(name), weights_only=True, map_location="cpu")
    ours = pretrained.read(weights(name))
    same(ours, found.get("state_dict", found))
    assert len(ours) > 90 and sum(a.size for a in ours.values()) > 250_000


def dtypes():
    names = ("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 "
             "bool").split()
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, 48, "uint8"))
    state = {n: raw.clone().view(getattr(torch, n)).reshape(2, 3, -1) for n in names[:-1]}
    return {**state, "bool": (raw > 99).reshape(6, 8), "nan": torch.tensor([np.nan, -np.inf, -0.])}


def views():
    base = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 5, 6)))
    flat = base.view(-1)
    return {"base": base, "rows": base[1:3], "transposed": base.permute(2, 0, 1),
            "stepped": base[:, ::2, 1::3], "offset": flat[7:101:9], "one": base[3, 4, 5],
            "again": base, "empty": base[:, :0], "last": flat[119:]}


def small():
    return {"number": torch.tensor(7), "none": torch.zeros(0), "nothing": torch.zeros(3, 0, 2),
            "parameter": torch.nn.Parameter(torch.randn(3, 2)),
            "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}


def module():  # an OrderedDict with attributes, counters among the tensors
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()


@needs_torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("make", [dtypes, views, small, module])
def test_state_dicts_bit_for_bit(tmp_path, make, new):
    state = make()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    same(pretrained.read(tmp_path / "a.pt"), state)


def optimised():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    adam = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    adam.step()
    return net.state_dict(), adam.state_dict()


@needs_torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [
    lambda s: {"epoch": 3, "arch": "ä", "best": 0.5, "history": [1, (2, None)], "state_dict": s},
    lambda s: {"state_dict": s, "best_acc1": torch.tensor(76.1)},  # PyTorch's ImageNet example
    lambda s: {"model": s, "scaler": {"scale": 2.0**16}}, lambda s: {"model_state_dict": s},
    lambda s: {"model": {"state_dict": s}, "step": torch.tensor(3)},
])
def test_wrappers_with_an_optimiser_beside(tmp_path, wrap, new):
    state, optimiser = optimised()
    whole = {"optimizer": optimiser, **wrap(state)}
    torch.save(whole, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    same(pretrained.read(tmp_path / "a.pth"), state)


class Python2:
    """A dict that pickles as OrderedDict([[key, value], ...]), as Python 2 wrote it."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, ([[key, value] for key, value in self.state.items()],)


@needs_torch
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_dicts_of_python_2(tmp_path, new):
    state, optimiser = optimised()
    for whole in (Python2(state), {"state_dict": Python2(state), "optimizer": Python2(optimiser)}):
        torch.save(whole, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        same(pretrained.read(tmp_path / "a.pth"), state)


@needs_torch
@pytest.mark.parametrize("word", ["éè", b"\xff\xfe\x01\x80"])
def test_texts_of_python_2_are_utf_8_or_bytes(tmp_path, word):
    raw, path = io.BytesIO(), tmp_path / "a.pth"
    torch.save({"état": torch.ones(2), "note": "XXXX"}, raw, _use_new_zipfile_serialization=False)
    raw = raw.getvalue().replace(text("état"), b"U\5" + "état".encode())
    word = word.encode() if isinstance(word, str) else word
    path.write_bytes(raw.replace(text("XXXX"), b"U\4" + word))
    assert b"U\4" + word in path.read_bytes() and list(pretrained.read(path)) == ["état"]


class Setting(Enum):
    A = 1


@needs_torch
@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_stands_beside_the_weights_is_no_obstacle(tmp_path, new, protocol):
    state, optimiser = optimised()
    beside = [Namespace(lr=1, model=Namespace(depth=3)), np.float64(3), np.float32(3), np.ones(3),
              np.array([{}], object), np.dtype("f4"), np.random.default_rng(0), torch.float32,
              torch.bfloat16, torch.device("cpu"), torch.strided, Counter("ab"), defaultdict(list),
              {1, 2}, frozenset("a"), b"ab", bytearray(b"ab"), Path("/x"), PurePosixPath("y"),
              datetime(2020, 1, 1), timedelta(1), deque([1]), range(3), slice(1), 1j, Setting.A,
              {(1, 2): 3, Setting.A: 4, torch.int8: torch.ones(2)}, ReLU(), getattr, ReLU().train,
              partial(max, 1), Fraction(1, 3), torch.Generator, type, torch.eye(2).to_sparse(),
              torch.nn.Linear(2, 3)]
    if new:
        beside += [torch.ones(2, dtype=torch.complex64),
                   torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)]
    for thing in [*beside, beside]:
        torch.save({"state_dict": state, "beside": thing, "optimizer": optimiser},
                   tmp_path / "a.pth", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=new)
        same(pretrained.read(tmp_path / "a.pth"), state)


@needs_torch
def test_tensors_of_a_subclass_and_expanded_ones(tmp_path):
    one = torch.arange(3.)
    state = {"buffer": torch.nn.Buffer(torch.ones(2)), "all": torch.ones(1).expand(4),
             "rows": one.expand(5, 3), "columns": one[:, None].expand(3, 2),
             "windows": one.unfold(0, 2, 1), "big": torch.ones(1).expand(1 << 12, 1 << 12)}
    torch.save(state, tmp_path / "a.pth")
    tracemalloc.start()
    found = pretrained.read(tmp_path / "a.pth")
    assert tracemalloc.get_traced_memory()[1] < MB
    tracemalloc.stop()
    assert found.pop("big").shape == state.pop("big").shape
    same(found, state)


@needs_torch
@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("beside", [False, True])
def test_a_tensor_of_another_kind_is_refused_by_its_name(tmp_path, beside):
    path, plain = tmp_path / "a.pth", {"b.weight": torch.ones(2)} if beside else {}
    for tensor, named in (
        (torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    ):
        torch.save({"state_dict": {"a.weight": tensor, **plain}, "epoch": 3}, path)
        assert re.search(rf"a\.weight .*{named}", refused(path))


@needs_torch
def test_state_dicts_side_by_side_are_told_apart(tmp_path):
    state, other = optimised()[0], {k: v + 1 for k, v in optimised()[0].items()}
    figures = {"best": torch.tensor(0.5), "rng": torch.get_rng_state(),
               "best_k_models": {"/runs/epoch=3.ckpt": torch.tensor(0.5)}}
    for whole, wanted in (
        ({"student": state, "teacher": state}, {"student.": state, "teacher.": state}),
        ({"model": state, "ema": {"decay": 0.9, "shadow": other}, **figures},
         {"model.": state, "ema.shadow.": other}),
        ({"net": state, "callbacks": figures, **figures}, {"": state}),
        ({"module": {"deep": {"deeper": state}}}, {"": state}),
    ):
        torch.save(whole, tmp_path / "a.pth")
        same(pretrained.read(tmp_path / "a.pth"), {
            prefix + name: a for prefix, part in wanted.items() for name, a in part.items()})
    torch.save({"a": {"b.c.d": torch.ones(1)}, "a.b": {"c.d": torch.ones(1)}}, tmp_path / "a.pth")
    assert "a.b.c.d" in refused(tmp_path / "a.pth")


@needs_torch
def test_safetensors_bit_for_bit(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    state = {k: v.contiguous() for k, v in sorted({**dtypes(), **small()}.items())}
    path = tmp_path / "a.safetensors"
    save(state, path)
    ours = pretrained.read(path)
    same({k: ours[k] for k in state}, state)
    assert list(ours) == sorted(state)  # the package gives them in any order
    path.rename(tmp_path / "a.bin")  # what the file is decides
    assert list(pretrained.read(tmp_path / "a.bin")) == list(ours)


def test_safetensors_whose_header_length_looks_like_a_zip(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save
    raw, path = save({"w": np.arange(3.0)}), tmp_path / "a.safetensors"
    length = int.from_bytes(raw[:8], "little")
    looks = int.from_bytes(b"PK", "little")  # JSON may be padded with spaces
    path.write_bytes(struct.pack("<Q", looks) + raw[8 : 8 + length].ljust(looks)
                     + raw[8 + length :])
    assert pretrained.read(path)["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.standard_normal((3, 4)).T, "b": rng.integers(0, 9, (2, 0, 3)),
              "c": np.array(2.5, "float16"), "d": rng.random(5) > 0.5}
    save(tmp_path / "a.npz", **arrays)
    found = pretrained.read(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


WITHOUT = """
import sys
for name in ("torch", "numpy.torch", "cupy"):
    sys.modules[name] = None
from tinyseg import pretrained
import hashlib
for path in sys.argv[1:]:
    digest = hashlib.sha256()
    for name, array in pretrained.read(path).items():
        digest.update(name.encode() + array.tobytes())
    print(digest.hexdigest())
assert not [m for m in sys.modules if m.split(".")[0] == "torch" and sys.modules[m]]
"""


def digest(arrays):
    whole = hashlib.sha256()
    for name, array in arrays.items():
        whole.update(name.encode() + array.tobytes())
    return whole.hexdigest()


@needs_torch
def test_reading_needs_no_pytorch(tmp_path, weights):
    paths = [tmp_path / "zip.pt", tmp_path / "legacy.pt"]
    for path in paths:
        torch.save(views(), path, _use_new_zipfile_serialization=path == paths[0])
    if (SHARED / "weights").exists():
        paths += [weights(CIFAR[0]), weights(IMAGENET["resnet18"])]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, paths)], text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = [torch.load(p, weights_only=True, map_location="cpu") for p in paths]
    states = [{k: v.detach().numpy() for k, v in s.get("state_dict", s).items()} for s in states]
    assert done.stdout.split() == [digest(state) for state in states]


# -- refusals --------------------------------------------------------------------------------------
# Pickles are assembled by hand, so that they can say what pickle.dumps would not.

NUMBERS = np.arange(6, dtype="<f4").tobytes()


def text(word):
    return b"X" + struct.pack("<i", len(word)) + word.encode()


def whole_number(n):
    return b"J" + struct.pack("<i", n)


def row(*numbers):
    return b"(" + b"".join(map(whole_number, numbers)) + b"t"


ZERO, ONE, SIX = (whole_number(n) for n in (0, 1, 6))


def storage(kind=b"ctorch\nFloatStorage\n", key="0", numel=SIX, more=b""):
    key = text(key) if isinstance(key, str) else key
    return b"(" + text("storage") + kind + key + text("cpu") + numel + more + b"tQ"


TWO_BY_THREE, ROWS = row(2, 3), row(3, 1)


def tensor(size=TWO_BY_THREE, stride=ROWS, offset=ZERO, over=None):
    over = storage() if over is None else over
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + over + offset + size + stride
            + b"\x89ccollections\nOrderedDict\n)RtR")


def state(*values, before=b""):
    """A pickle of {"w0": value, ...}."""
    body = b"".join(text(f"w{i}") + value for i, value in enumerate(values))
    return b"\x80\x02" + before + b"}(" + body + b"u."


def zipped(body, members=None, method=zipfile.ZIP_STORED):
    members = {"data/0": NUMBERS, "version": b"3\n"} if members is None else members
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may stand twice
        archive.writestr("archive/data.pkl", body)
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def legacy(body, keys=("0",), count=6, numbers=NUMBERS, magic=0x1950A86A20F9469CFC6C, version=1001,
           machine=None):
    machine = {"little_endian": True} if machine is None else machine
    parts = [pickle.dumps(part, 2) for part in (magic, version, machine)]
    return b"".join([*parts, body, pickle.dumps(list(keys), 2), struct.pack("<q", count), numbers])


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array=None, shape=None, descr="<f4"):
    file = io.BytesIO()
    if array is None:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    else:
        np.lib.format.write_array(file, array)
    return file.getvalue()


def test_the_assembled_files_are_read(tmp_path):
    """Otherwise the refusals below would prove nothing."""
    for raw in (zipped(state(tensor())), legacy(state(tensor(over=storage(more=b"N"))))):
        (tmp_path / "a.pth").write_bytes(raw)
        found = pretrained.read(tmp_path / "a.pth")["w0"]
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]] and found.dtype == "float32"
        if torch is not None:
            same({"w0": found}, torch.load(tmp_path / "a.pth", weights_only=True))


class Bad:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", [zipped, legacy])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("what, named", [
    (lambda canary: Bad(os.system, f"touch '{canary}'"), "system"),
    (lambda canary: Bad(eval, f"open({str(canary)!r}, 'w')"), "eval"),
    (lambda canary: Bad(getattr, "a", "upper"), "getattr"),
    (lambda canary: np.float64(76.1), "scalar"),
    (lambda canary: np.ones(3), "_reconstruct"),
    (lambda canary: Namespace(lr=0.1), "argparse.Namespace"),
    (lambda canary: ReLU(), "tinyseg.nn.ReLU"),
    (lambda canary: Path("/"), "pathlib"),
    (lambda canary: {1, 2}, "set"),
])
def test_what_is_asked_for_is_named_and_not_run(tmp_path, container, protocol, what, named):
    canary, path = tmp_path / "ran", tmp_path / "a.pth"
    asked = pickle.dumps({"state_dict": {"w": 1}, "args": what(canary)}, protocol)
    path.write_bytes(container(asked))
    message = refused(path)
    assert not canary.exists()
    if not (named == "set" and protocol == 4):  # there an opcode, not a name
        assert named in message and "not run" in message
    if isinstance(what(canary), Bad):  # the canary would sing
        pickle.loads(asked)
        assert canary.exists() or named == "getattr"


@pytest.mark.parametrize("container", [zipped, legacy])
@pytest.mark.parametrize("ask", [b"cposix\nsystem\n", b"c__builtin__\neval\n",
                                 b"cbuiltins\nexec\n", b"csubprocess\nPopen\n",
                                 text("os") + text("path.exists") + b"\x93"])
def test_an_attack_beside_good_weights_is_told(tmp_path, container, ask):
    path = tmp_path / "a.pth"
    for call in (ask + b"(" + text("true") + b"tR", ask, ask + b")\x81"):
        path.write_bytes(container(state(tensor(), call)))
        message = refused(path)
        assert "was not run" in message and any(
            name in message for name in ("system", "eval", "exec", "Popen", "os.path.exists"))


@needs_torch
def test_a_whole_module_or_another_type_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    for new in (True, False):
        for thing, named in ((torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
                             ({"w": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
                             ({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
                             ({"w": torch.zeros(2).to_sparse()}, "sparse")):
            torch.save(thing, path, _use_new_zipfile_serialization=new)
            assert named in refused(path)


def bounded(path):
    """Read a file that may be bad: arrays, or ValueError naming it; and little memory."""
    size = path.stat().st_size
    tracemalloc.start()
    try:
        try:
            arrays = pretrained.read(path)
        except ValueError as error:
            assert str(path) in str(error)
            arrays = None
        assert tracemalloc.get_traced_memory()[1] < MB + 20 * size
    finally:
        tracemalloc.stop()
    return arrays


HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 62)
BODIES = {
    "no dict": b"\x80\x02K\x01.", "no tensor": state(whole_number(1)), "nothing": b"\x80\x02}.",
    "numbers as names": b"\x80\x02}K\x01" + tensor() + b"s.",
    "expanded too far": state(tensor(stride=row(0, 0), size=row(1 << 13, 1 << 13))),
    "expanded without end": state(tensor(stride=row(0), size=b"(" + HUGE + b"t")),
    "expanded, its last beyond": state(tensor(stride=row(0, 3), size=row(9, 3))),
    "negative size": state(tensor(size=row(-2, 3))),
    "two negative sizes": state(tensor(size=row(-2, -3))),
    "negative stride": state(tensor(stride=row(-3, 1))),
    "negative offset": state(tensor(offset=whole_number(-1))),
    "beyond": state(tensor(offset=whole_number(1))),
    "ranks differ": state(tensor(size=row(6), stride=row(3, 1))),
    "ranks 33": state(tensor(size=row(*[1] * 33), stride=row(*[1] * 33))),
    "a list of sizes that are text": state(tensor(size=b"(" + text("2") + text("3") + b"t")),
    "true as a size": state(tensor(size=b"\x88\x88\x86")),
    "huge size": state(tensor(size=b"(" + HUGE * 2 + b"t")),
    "huge stride": state(tensor(stride=b"(" + HUGE * 2 + b"t")),
    "huge empty stride": state(tensor(size=row(0, 0), stride=b"(" + HUGE * 2 + b"t")),
    "no storage": state(tensor(over=b"N")),
    "storage of no kind": state(tensor(over=storage(kind=b"N"))),
    "storage of a function": state(tensor(over=storage(kind=b"ctorch\nSize\n"))),
    "storage too long": state(tensor(over=storage(numel=whole_number(7)))),
    "storage too short": state(tensor(over=storage(numel=whole_number(5)))),
    "storage of negative length": state(tensor(over=storage(numel=whole_number(-6)))),
    "storage of huge length": state(tensor(over=storage(numel=HUGE))),
    "storage of another kind": state(tensor(over=storage(kind=b"ctorch\nDoubleStorage\n"))),
    "storage that is missing": state(tensor(over=storage(key="1"))),
    "storage elsewhere": state(tensor(over=storage(key="../version"))),
    "a view of a storage": state(tensor(over=storage(more=row(1, 2, 3)))),
    "another persistent thing": state(b"(" + text("module") + b"NNNNtQ"),
    "a persistent number": state(b"K\x01Q"), "a persistent line": state(b"P7\n"),
    "a number called": state(b"K\x01)R"), "a storage type called": state(
        b"ctorch\nFloatStorage\n)R"),
    "too few arguments": state(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "an instance": state(b"ctorch\nSize\n)\x81"), "an old instance": state(b"(itorch\nSize\n"),
    "an extension": state(b"\x82\x01"), "a buffer": b"\x80\x05\x97.",
    "an empty stack": b"\x80\x02R.", "no mark": b"\x80\x02t.", "no stop": b"\x80\x02}",
    "memo that is not": b"\x80\x02h\x07.", "protocol 9": b"\x80\x09}.",
    "name without a line": b"\x80\x02ctorch", "no opcode": b"\x80\x02\xff.",
}


@pytest.mark.parametrize("container", [zipped, legacy])
@pytest.mark.parametrize("what", BODIES)
def test_bodies_that_are_refused(tmp_path, container, what):
    path = tmp_path / "a.pth"
    path.write_bytes(container(BODIES[what]))
    if what == "huge empty stride" and bounded(path) is not None:  # legal: nothing is looked at
        assert pretrained.read(path)["w0"].shape == (0, 0)
        return
    assert bounded(path) is None
    refused(path)


def lying(raw, offset, value):
    """The zip with a number (4 bytes) of its last directory entry replaced."""
    raw = bytearray(raw)
    at = raw.rfind(b"PK\1\2") + offset
    raw[at : at + 4] = struct.pack("<I", value)
    return bytes(raw)


def archive(members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            out.writestr(name, content)
    return file.getvalue()


GOOD = state(tensor())
LOUD = npy(shape=(1 << 27,))  # half a GiB of float32
CONTAINERS = {
    "empty": b"", "zeros": bytes(1000), "text": b"version https://git-lfs.github.com/spec/v1\n",
    "an empty zip": archive([]), "a zip of anything": archive([("a.txt", b"a")]),
    "two pickles": archive([("a/data.pkl", GOOD), ("b/data.pkl", GOOD), ("a/data/0", NUMBERS)]),
    "compressed": zipped(GOOD, {"data/0": NUMBERS}, zipfile.ZIP_DEFLATED),
    "big-endian zip": zipped(GOOD, {"data/0": NUMBERS, "byteorder": b"big"}),
    "a name twice": zipped(GOOD, [("data/0", bytes(24)), ("data/0", NUMBERS)]),
    "pickle twice": zipped(GOOD, [("data.pkl", GOOD), ("data/0", NUMBERS)]),
    "packed size lies": lying(zipped(GOOD, {"data/0": NUMBERS}), 20, 1 << 30),
    "size lies": lying(zipped(GOOD, {"data/0": NUMBERS}), 24, 1 << 30),
    "both lie": lying(lying(zipped(GOOD, {"data/0": NUMBERS}), 20, 1 << 30), 24, 1 << 30),
    "no storage": zipped(GOOD, {}), "storage too long": zipped(GOOD, {"data/0": NUMBERS * 2}),
    "magic": legacy(GOOD, magic=7), "version": legacy(GOOD, version=1002),
    "big-endian": legacy(GOOD, machine={"little_endian": False}),
    "no machine": legacy(GOOD, machine=3), "no keys": legacy(GOOD, keys=()),
    "another key": legacy(GOOD, keys=("1",)), "a key of no text": legacy(GOOD, keys=([],)),
    "legacy count": legacy(GOOD, count=7), "legacy count, negative": legacy(GOOD, count=-6),
    "legacy count, huge": legacy(GOOD, count=1 << 40), "count 5": legacy(GOOD, count=5),
    "BINUNICODE8": legacy(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."),
    "BINBYTES8": legacy(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "BINUNICODE8 zip": zipped(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."),
    "BYTEARRAY8": legacy(b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b"."),
    "BYTEARRAY8 zip": zipped(b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b"."),
    "FRAME": legacy(b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"."),
    "LONG4": legacy(b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"."),
    "LONG4, negative": legacy(b"\x80\x02\x8b" + struct.pack("<i", -1) + b"."),
    "tar": bytes(257) + b"ustar" + bytes(300),
    "npz of objects": npz(a=np.array([{}, None], dtype=object)),
    "npz twice": archive([("a.npy", npy(np.ones(2))), ("a.npy", npy(np.zeros(2)))]),
    "npz shape": archive([("a.npy", npy(shape=(7, 3)) + bytes(4))]),
    "npz shape, huge": archive([("a.npy", npy(shape=(1 << 50,)))]),
    "npz shape, negative": archive([("a.npy", npy(shape=(-1, -1)) + bytes(4))]),
    "npz no header": archive([("a.npy", b"\x93NUMPY\x01\x00\xff\xff{")]),
    "npz no array": archive([("a.npy", b"")]),
    "npz claims": lying(archive([("a.npy", LOUD)], zipfile.ZIP_DEFLATED), 24,
                        len(LOUD) + (1 << 29)),
    "npz claims, stored": lying(archive([("a.npy", LOUD)]), 24, len(LOUD) + (1 << 29)),
    "safetensors length": struct.pack("<Q", 1 << 40) + b'{"w":1}',
    "safetensors type": struct.pack("<Q", 62)
    + b'{"w":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[0,2]}}    ' + bytes(2),
    "safetensors shape": struct.pack("<Q", 62)
    + b'{"w":{"dtype":"F32","shape":[999999],"data_offsets":[0,4]}}   ' + bytes(4),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("what", CONTAINERS)
def test_containers_that_are_refused(tmp_path, what, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(CONTAINERS[what])
    assert bounded(path) is None


def doubled(kind, levels):
    """Containers of two of the one before: 2**levels leaves in a few bytes; left in the memo."""
    nest = b"(K\x01" + kind + b"q\0"
    for i in range(levels):
        nest += b"0(" + 2 * (b"h" + bytes([i])) + kind + b"q" + bytes([i + 1])
    return nest + b"0", b"h" + bytes([levels])


def bomb(what):
    tuples, top = doubled(b"t", 60)
    lists, many = doubled(b"l", 60)
    number = b"\x8b" + struct.pack("<i", 1 << 17) + b"\x7f" * (1 << 17) + b"q\x010"
    wide = b"}q\0" + b"".join(  # 500 ** 4 ways to the last
        b"0}(" + b"".join(text(f"k{k}") + b"h" + bytes([i]) for k in range(500))
        + b"uq" + bytes([i + 1]) for i in range(4))
    pairs = b"](" + b"](K\1K\2e" * 10_000 + b"eq\x010ccollections\nOrderedDict\nq\x020"
    long = b"](" + b"N" * 100_000 + b"eq\x010ctorch\nSize\nq\x020"
    return {
        "a memo index": b"\x80\x02Nr\xff\xff\xff\xff0" + GOOD[2:],
        "a wrapper that holds itself": b"\x80\x02}q\0" + text("state_dict") + b"h\0s.",
        "hashing tuples": b"\x80\x02" + tuples + b"}" + top + b"Ns.",
        "hashing tuples, many": b"\x80\x02" + tuples + b"}(" + top + b"Nu.",
        "hashing tuples, old": b"\x80\x02" + tuples + b"(" + top + b"Nd.",
        "hashing tuples in a set": b"\x80\x04" + tuples + b"\x8f(" + top + b"\x90.",
        "printing a key": b"\x80\x02" + lists + tensor(over=storage(key=many)) + b".",
        "printing a tag": b"\x80\x02" + lists + b"(" + many + b"NNNNtQ.",
        "long numbers": b"\x80\x02" + number + state(
            tensor(size=b"(" + b"h\x01" * 32 + b"t", stride=row(*[1] * 32)))[2:],
        "dicts in dicts": b"\x80\x02" + wide + b".",
        "dicts of pairs": b"\x80\x02" + pairs + b"(" + b"h\x02h\x01\x85R" * 20_000 + b"l.",
        "long names": b"\x80\x04" + text("m" * (1 << 18)) + b"q\x010("
        + b"h\x01h\x01\x93" * 20_000 + b"l.",
        "long arguments": b"\x80\x02(" + b"N" * 100_000 + b"tq\x010cm\nf\nq\x020("
        + b"h\x02h\x01R" * 20_000 + b"l.",
        "copies": b"\x80\x02" + long + b"(" + b"h\x02h\x01\x85R" * 20_000 + b"l.",
    }[what]


READ = """
import resource, sys, tracemalloc
from tinyseg import pretrained
tracemalloc.start()
try:
    print(list(pretrained.read(sys.argv[1])))
except ValueError as error:
    print("refused" if sys.argv[1] in str(error) else error)
print(tracemalloc.get_traced_memory()[1] >> 20)
"""


@pytest.mark.parametrize("what", [
    "a memo index", "a wrapper that holds itself", "hashing tuples", "hashing tuples, many",
    "hashing tuples, old", "hashing tuples in a set", "printing a key", "printing a tag",
    "long numbers", "copies", "dicts in dicts", "dicts of pairs", "long names", "long arguments",
])
def test_a_small_file_takes_no_long_time_and_no_memory(tmp_path, what):
    path = tmp_path / "a.pth"
    path.write_bytes(zipped(bomb(what)))
    assert path.stat().st_size < MB
    limits = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    done = subprocess.run([sys.executable, "-c", limits + READ, path], text=True, timeout=60,
                          capture_output=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    answer, peak = done.stdout.splitlines()
    assert answer == ("['w0']" if what == "a memo index" else "refused") and int(peak) < 16


@pytest.mark.parametrize("attack", [
    b"ctorch\nFloatStorage\n(" + text("i4") + b"tb.",
    b"ctorch\nFloatStorage\nN}" + text("name") + text("i4") + b"s\x86b.",
    b"ccollections\nOrderedDict\nN}" + text("function") + b"K\x05s\x86b.",
    b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("function") + b"ctorch\nSize\ns\x86b.",
])
def test_no_file_changes_how_the_next_is_read(tmp_path, attack):
    """BUILD sets attributes: of objects that outlive the file it would change the reader."""
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    good.write_bytes(zipped(GOOD))
    bad.write_bytes(zipped(b"\x80\x02" + attack))
    before = pretrained.read(good)["w0"]
    code = ("import sys\nfrom tinyseg import pretrained\ntry:\n pretrained.read(sys.argv[1])\n"
            "except ValueError:\n pass\nprint(pretrained.read(sys.argv[2])['w0'].tolist())")
    done = subprocess.run([sys.executable, "-c", code, bad, good], text=True, capture_output=True,
                          timeout=60)
    assert done.stdout.strip() == str(before.tolist()), done.stderr


BESIDE = [  # every opcode of objects, made of a name that is not in the table
    b"cm\nC\n)\x81}" + text("a") + b"K\1sb", b"cm\nC\n)}\x92", b"(im\nOld\n", b"(cm\nOld\nK\1o",
    b"cm\nf\n(K\1tR(K\1K\2eK\3a", b"cm\nD\n)\x81(K\1K\2u", b"\x8f(K\1K\2\x90", b"(K\1\x91",
    b"\x96" + struct.pack("<Q", 3) + b"abc", text("m") + text("n") + b"\x93",
    b"U\4\xc3\xa9\xc3\xa8", b"U\1\xff", b"}K\1K\2\x86K\3s", tensor(stride=row(0, 1)),
    b"ccollections\nOrderedDict\n](](" + text("a") + b"K\1ee\x85R}b",
    b"ctorch._utils\n_rebuild_qtensor\n(" + storage(b"ctorch\nFloatStorage\n") + b"K\1tR",
]


def samples():
    rng = np.random.default_rng(0)
    two = state(tensor(), tensor(row(3), row(2), whole_number(1)))
    whole = b"".join([b"\x80\x04}(", text("state_dict"), two[2:-1], text("beside"), b"](", *BESIDE,
                      b"eu."])
    files = {"zip": zipped(two), "legacy": legacy(two),
             "zip, more": zipped(whole), "legacy, more": legacy(whole),
             "npz": npz(a=rng.standard_normal((3, 2)), b=np.arange(4)),
             "compressed": archive([("a.npy", npy(np.ones((9, 9))))], zipfile.ZIP_DEFLATED)}
    try:
        from safetensors.numpy import save
    except ImportError:
        return files
    return {**files, "safetensors": save({"a": rng.standard_normal((3, 2)), "b": np.arange(4)})}


SAMPLES = samples()


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_truncation_is_refused(tmp_path, kind):
    raw, path = SAMPLES[kind], tmp_path / "a.bin"
    for length in range(0, len(raw), 1 if len(raw) < 600 else 3):
        path.write_bytes(raw[:length])
        refused(path)
    path.write_bytes(raw)
    assert len(pretrained.read(path)) == (1 if kind == "compressed" else 2)


@st.composite
def mutated(draw):
    """A good file with a few bytes changed, a piece lost, doubled or inserted."""
    raw = bytearray(SAMPLES[draw(st.sampled_from(sorted(SAMPLES)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        how = draw(st.sampled_from(["set", "set", "number", "lose", "double", "insert"]))
        length = draw(st.integers(1, 16))
        if how == "set":
            raw[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b"\x00\xff\x7f\x80.tR")))
        elif how == "number":
            raw[at : at + 4] = struct.pack("<i", draw(st.sampled_from(
                [0, -1, 1, 7, 1 << 30, -(1 << 31), (1 << 31) - 1])))
        elif how == "lose":
            del raw[at : at + length]
        elif how == "double":
            raw[at:at] = raw[at : at + length]
        else:
            raw[at:at] = draw(st.binary(min_size=1, max_size=9))
        if not raw:
            break
    return bytes(raw)


CODES = b"(012])}tldeasuRboQ\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94"
OPCODES = [*(bytes([code]) for code in CODES), *BESIDE, b"N", b"K\1", text("a.b"),
           text("state_dict"), b"q\0", b"q\1", b"h\0", b"h\1",
           b"cm\nC\n", b"(im\nC\n", b"ccollections\nOrderedDict\n", b"ccollections\ndefaultdict\n",
           b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
           b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n", storage(), tensor(),
           storage(kind=b"cm\nC\n"), tensor(stride=row(0, 1))]


@st.composite
def programs(draw):
    """A pickle of opcodes in any order, on a stack of some depth; many hold a good state dict."""
    good = state(tensor())[2:-1]
    body = b"".join(draw(st.lists(st.sampled_from([*OPCODES, good]), max_size=40)))
    first, last = draw(st.sampled_from([(b"", b""), (good, b""), (b"", good)]))
    body = b"\x80\x04Nq\0q\1)}(](}" + first + body + last + b"."
    return draw(st.sampled_from([zipped, legacy]))(body)


def held(array):
    """Bytes between the first and the last number: an expanded tensor repeats some."""
    steps = zip(array.shape, array.strides, strict=True)
    return array.itemsize + sum((n - 1) * step for n, step in steps) if array.size else 0


def mutation(folder):
    path = folder / "mutated.bin"

    def check(raw):
        path.write_bytes(raw)
        arrays = bounded(path)
        if arrays is not None:  # harmless, then
            assert sum(map(held, arrays.values())) <= 4 * len(raw) + 9 * 9 * 8
            assert all(a.size <= max(1 << 24, len(raw)) for a in arrays.values())
    return check


@settings(max_examples=400, deadline=None)
@given(raw=st.one_of(mutated(), programs()))
def test_mutated_files_are_read_or_refused(tmp_path_factory, raw):
    mutation(tmp_path_factory.getbasetemp())(raw)


@pytest.mark.slow
@settings(max_examples=12_000, deadline=None)
@given(raw=st.one_of(mutated(), programs()))
def test_ten_thousand_mutated_files_are_read_or_refused(tmp_path_factory, raw):
    mutation(tmp_path_factory.getbasetemp())(raw)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            pretrained.read(path)
    with pytest.raises(FileNotFoundError, match="a folder; expected the file"):
        pretrained.read(tmp_path)


@pytest.mark.parametrize("content, told", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html>", "web page"), (b"<?xml version='1.0'?>", "web page"),
    (b"", "empty"), (gzip.compress(b"weights", mtime=0), "unpack"), (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b'{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001.safetensors"}}', "index"),
    (b'{"meta":{"weight_map": {"a": "pytorch_model-00001.bin"}}}', "read each of them"),
    (npz(w=np.ones(2), meta=np.array({"lr": 1}, object)), "meta.npy holds Python objects"),
    (archive([("a/b.txt", b"a")]), "without data.pkl"),
])
def test_what_is_no_checkpoint_is_told_what_it_is(tmp_path, content, told):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert told in refused(path)


@needs_torch
def test_torchscript_is_told_what_it_is(tmp_path):
    path = tmp_path / "weights.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert "TorchScript" in refused(path)


# -- mappings --------------------------------------------------------------------------------------

def wake(model, seed=0):
    """A PyTorch network in eval mode whose batch-norm does something."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if hasattr(part, "running_var"):
            for array, least in ((part.weight, 0.5), (part.running_var, 0.5), (part.bias, -0.5),
                                 (part.running_mean, -0.5)):
                array.data.uniform_(least, least + 1, generator=generator)
    return model.eval()


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def unchanged(net, before):
    return all(np.array_equal(a, before[name]) for name, a in net.state().items())


@pytest.fixture(scope="module")
def classifier():
    if torch is None:
        pytest.skip("PyTorch, the oracle, is not installed")
    torch.manual_seed(0)
    return wake(Net("resnet18", 2, 3, 7, "classify", output_stride=32))


NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def numbered(name):
    """RadImageNet's names: the children of a ResNet by number."""
    first, _, rest = name.partition(".")
    return f"backbone.{NUMBERED[first]}.{rest}" if first in NUMBERED else name


@pytest.mark.parametrize("rename", [
    "module.{}".format, "_orig_mod.{}".format, "module._orig_mod.{}".format, "encoder.{}".format,
    "resnet18_8s.{}".format, "module.resnet18_8s.{}".format, "model.{}".format, numbered,
    lambda name: "module." + numbered(name), "backbone.{}".format,
])
def test_prefixes(classifier, rename):
    state = {k: v.numpy() for k, v in classifier.state_dict().items() if "num_b" not in k}
    arrays = pretrained.mapping.renamed({rename(k): v for k, v in state.items()})
    found = {k: arrays[name] for k, name in pretrained.mapping._trunk(arrays, None)[1].items()}
    assert list(found) == list(state) and all(found[k] is state[k] for k in state)
    assert rename("conv1.weight") != "conv1.weight"


@pytest.mark.parametrize("rename", [str, lambda name: "module." + numbered(name)])
def test_classifiers(tmp_path, classifier, rename):
    state = {rename(name): value for name, value in classifier.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    config = pretrained.recognise(pretrained.read(tmp_path / "a.pth"))
    assert config == {"model": "resnet", "backbone": "resnet18", "rank": 2, "in_channels": 3,
                      "classes": 7}
    net = ts.models.build(config)
    report = pretrained.load(net, tmp_path / "a.pth")
    assert not report.missing and not report.unexpected
    assert {*report.matched, *(r[0] for r in report.reshaped)} == set(net.state())
    x = normal(2, 45, 37, 3)
    assert close(evaluate(net, x), forward(classifier, x), 1e-4)

    seg = ts.models.resnet_seg(rank=2, in_channels=3, classes=2)
    head = {name: a for name, a in seg.state().items() if name.startswith("fc.")}
    report = pretrained.load(seg, tmp_path / "a.pth", head="drop")
    assert report.unexpected == ["fc.weight", "fc.bias"] and len(report.notes) == 2
    for name, array in seg.state().items():
        wanted = head[name] if name in head else net.state()[name]
        np.testing.assert_array_equal(array, wanted)


def shapes(backbone, head="classify", classes=1000):
    """The names and shapes of a network, without its numbers."""
    with torch.device("meta"):
        model = Net(backbone, 2, 3, classes, head)
    return {k: np.broadcast_to(np.float32(0), v.shape) for k, v in model.state_dict().items()}


@needs_torch
def test_recognise():
    for backbone in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        rest = {"backbone": backbone, "rank": 2, "in_channels": 3}
        arrays = shapes(backbone)
        wanted = {"model": "resnet", "classes": 1000, **rest}
        assert pretrained.recognise(arrays) == wanted
        assert pretrained.recognise({numbered(k): v for k, v in arrays.items()}) == wanted
        bare = {k: v for k, v in arrays.items() if not k.startswith("fc.")}
        with pytest.raises(ValueError, match=f"{backbone} without a head"):
            pretrained.recognise({numbered(k): v for k, v in bare.items()})
        for prefix in (f"{backbone}_8s.", f"{backbone}_16s."):
            linear = {prefix + k: v for k, v in shapes(backbone, "linear", 21).items()}
            assert pretrained.recognise(linear) == {"model": "resnet_seg", "classes": 21, **rest}
        for head in ("fcn", "deeplabv3"):
            assert pretrained.recognise(torchvision(shapes(backbone, head, 21))) == {
                "model": "resnet_seg", "head": head, "classes": 21, "align_corners": False,
                "dilate_first_block": False, **rest}


@needs_torch
@pytest.mark.parametrize("change, message", [
    (lambda s: {}, "first names"), (lambda s: {"w": np.ones(3)}, "first names w"),
    (lambda s: {k: v for k, v in s.items() if k != "conv1.weight"}, "first names"),
    (lambda s: {k: v for k, v in s.items() if not k.startswith("layer3.1")}, "2, 2, 1, 2"),
    (lambda s: {**s, "conv1.weight": np.ones(3)}, "first names"),
    (lambda s: {**s, "conv1.weight": np.ones((64, 10**12, 0, 7))}, "first names"),
    (lambda s: {**s, "fc.weight": np.array(1.0)}, "without a head"),
    (lambda s: {**s, "fc.weight": np.ones((10**12, 0))}, "without a head"),
    (lambda s: {**s, "module.fc.weight": np.ones((2, 2))}, "fc.weight"),
])
def test_what_is_not_recognised(change, message):
    with pytest.raises(ValueError, match=message):
        pretrained.recognise(change(shapes("resnet18")))


def test_a_cifar_network_is_not_ours(weights):
    with pytest.raises(ValueError, match=r"\(3, 3, 3, 0\) blocks"):
        pretrained.recognise(pretrained.read(weights(CIFAR[0])))


def torchvision(state):
    """The names of torchvision's segmentation networks, with an auxiliary head."""
    named = {k if k.startswith("classifier.") else f"backbone.{k}": v for k, v in state.items()}
    some = next(iter(state.values()))
    full = np.ones if isinstance(some, np.ndarray) else torch.ones
    return {**named, "aux_classifier.0.weight": full((256, 1024, 3, 3)),
            "aux_classifier.1.running_var": full(256), "aux_classifier.4.bias": full(21)}


def unet():
    """A Unet of segmentation_models_pytorch in PyTorch, and its state under its names."""
    torch.manual_seed(2)
    model = wake(Net("resnet18", 2, 3, 2, "unet", output_stride=32, decoder=(9, 8, 7, 6, 5)))
    return model, segmentation_models_names(model.state_dict())


@needs_torch
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_an_encoder_and_decoder(tmp_path, prefix):
    model, state = unet()
    path = tmp_path / "unet.pth"
    torch.save({prefix + name: a for name, a in state.items()}, path)
    config = pretrained.recognise(pretrained.read(path))
    assert config == {"model": "resnet_seg", "head": "unet", "decoder": (9, 8, 7, 6, 5),
                      "classes": 2, "backbone": "resnet18", "rank": 2, "in_channels": 3}
    net = ts.models.build(config)
    report = pretrained.load(net, path)
    assert report.prefix == f"{prefix}encoder." and not report.missing and not report.unexpected
    assert {*report.matched, *(r[0] for r in report.reshaped)} == set(net.state())
    x = normal(2, 45, 37, 3)
    assert close(evaluate(net, x), forward(model, x), 1e-4)

    other = ts.models.resnet_seg(rank=2, in_channels=3, classes=5, head="unet")
    before = other.state()
    pretrained.load(other, path, head="drop")  # the trunk alone
    for name, array in other.state().items():
        behind = name.startswith(("decoder.", "segmentation_head."))
        np.testing.assert_array_equal(array, before[name] if behind else net.state()[name])


@needs_torch
@pytest.mark.parametrize("change, message", [
    (lambda s: {**s, "decoder.blocks.0.attention1.weight": s["encoder.bn1.weight"]},
     "decoder.blocks.0.attention1.weight is not in the network"),
    (lambda s: {**s, "segmentation_head.1.bias": s["encoder.bn1.weight"]},
     "segmentation_head.1.bias is not in the network"),
    (lambda s: {n: a for n, a in s.items() if n != "decoder.blocks.4.conv2.1.bias"},
     "decoder.blocks.4.conv2.1.bias is missing"),
    (lambda s: {**s, "segmentation_head.0.bias": s["encoder.bn1.weight"]},
     r"segmentation_head.0.bias has shape \(64,\)"),
])
def test_an_encoder_and_decoder_are_taken_whole_or_not_at_all(change, message):
    state = {name: a.detach().numpy() for name, a in unet()[1].items()}
    net = ts.models.resnet_seg(rank=2, in_channels=3, classes=2, head="unet",
                               decoder=(9, 8, 7, 6, 5))
    before = net.state()
    with pytest.raises(ValueError, match=message):
        pretrained.load(net, change(state))
    assert unchanged(net, before)


@needs_torch
@pytest.mark.parametrize("head, sizes", [("fcn", [(33, 47), (41, 30)]), ("deeplabv3", [(35, 49)])])
def test_torchvision_segmentation(tmp_path, head, sizes):
    torch.manual_seed(1)
    model = wake(Net("resnet50", 2, 3, 21, head, dilate_first_block=False, align_corners=False))
    path = tmp_path / "a.pth"
    torch.save(torchvision(model.state_dict()), path)
    net = ts.models.build(pretrained.recognise(pretrained.read(path)))
    report = pretrained.load(net, path)
    path.unlink()  # 150 MB
    assert not report.missing and len(report.unexpected) == 3
    assert all(name.startswith("aux_classifier.") for name in report.unexpected)
    for size in sizes:
        x = normal(1, *size, 3)
        y = forward(model, x)
        assert close(evaluate(net, x), y, 1e-4)
    net.align_corners = True  # the figure depends on it
    assert not close(evaluate(net, x), y, 1e-3)


@needs_torch
@pytest.mark.parametrize("classes", [21, 2])
def test_pakhomov(tmp_path, classes):
    torch.manual_seed(2)
    model = wake(Net("resnet18", 2, 3, classes, "linear"))
    state = {f"resnet18_8s.{k}": v for k, v in model.state_dict().items() if "num_b" not in k}
    assert len(state) == 102
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)  # of 2017
    net = ts.models.build(pretrained.recognise(pretrained.read(tmp_path / "a.pth")))
    assert sum(p.data.size for p in net.parameters()) == 11_176_512 + 513 * classes
    pretrained.load(net, tmp_path / "a.pth")
    for size in ((33, 50), (61, 39)):
        x = normal(2, *size, 3)
        assert close(evaluate(net, x), forward(model, x), 1e-4)

    other = ts.models.resnet_seg(rank=2, in_channels=3, classes=3)
    before = other.state()
    with pytest.raises(ValueError, match=rf"fc.weight has shape \({classes}, 512, 1, 1\)"):
        pretrained.load(other, tmp_path / "a.pth")
    assert unchanged(other, before)
    report = pretrained.load(other, tmp_path / "a.pth", head="drop")
    assert report.notes == [f"the head stays as it was: fc.{n}" for n in ("weight", "bias")]
    assert np.array_equal(other.state()["fc.weight"], before["fc.weight"])
    assert np.array_equal(other.state()["layer4.1.bn2.bias"], net.state()["layer4.1.bn2.bias"])


def foreign(state):
    """Our state in PyTorch's layout."""
    return {k: a if a.ndim < 2 else np.moveaxis(a, (-1, -2), (0, 1)) for k, a in state.items()}


def awake(net, seed=0, dtype="float32"):
    """Random batch-norm parameters and statistics, in eval mode."""
    rng = np.random.default_rng(seed)
    net.astype(dtype).load_state(
        {name: rng.uniform(0.5, 1.5, a.shape) if name.endswith(("weight", "var"))
         else rng.uniform(-0.5, 0.5, a.shape)
         for name, a in net.state().items() if a.ndim == 1}, strict=False)
    return net.eval()


@pytest.fixture(scope="module")
def states():
    return {b: foreign(awake(ts.models.resnet(b, rank=2, in_channels=3, classes=4)).state())
            for b in ("resnet18", "resnet34")}


def save(path, state):
    np.savez(path, **state)
    return path


@pytest.mark.parametrize("file, network, message", [
    ("resnet34", "resnet18", r"layer1\.2\.conv1\.weight is not in the network"),
    ("resnet18", "resnet34", r"layer1\.2\.conv1\.weight is missing"),
])
def test_the_wrong_depth_is_refused(tmp_path, states, file, network, message):
    net, path = ts.models.resnet(network, rank=2, in_channels=3, classes=4), tmp_path / "a.npz"
    before = net.state()
    save(path, states[file])
    text = refused(path, lambda path: pretrained.load(net, path))
    assert "... and" in text
    with pytest.raises(ValueError, match=message):
        pretrained.load(net, path)
    assert unchanged(net, before)


def test_strictness(tmp_path, states):
    whole = states["resnet18"]
    net = ts.models.resnet(rank=2, in_channels=3, classes=4)
    before, path = net.state(), tmp_path / "a.npz"

    def attempt(state, message, **options):
        save(path, state)
        with pytest.raises(ValueError, match=message):
            pretrained.load(net, path, **options)
        assert unchanged(net, before)

    bare = {k: v for k, v in whole.items() if not k.startswith("fc.")}
    attempt(bare, r"fc\.weight is missing\n  fc\.bias is missing")
    attempt(bare, r"fc\.bias is missing", allow_missing=["fc.weight"])
    attempt(bare, r"fc\.weight is missing", allow_missing=["fc"])  # no dot: a whole name
    attempt({k: v for k, v in whole.items() if k != "layer2.0.bn1.running_mean"},
            r"layer2\.0\.bn1\.running_mean is missing")  # the classic
    attempt({**whole, "extra.weight": np.ones(3)}, r"extra\.weight is not in the network")
    attempt({**whole, "bn1.bias": np.ones(65)}, r"bn1\.bias has shape \(65,\)")
    attempt({**whole, "conv1.weight": np.ones(64)}, r"conv1\.weight has shape \(64,\)")
    attempt({**whole, "conv1.weight": np.ones((64, 4, 7, 7))}, r"conv1\.weight has shape")
    attempt({**whole, "module.bn1.bias": whole["bn1.bias"]}, "bn1.bias")
    attempt({**whole, "bn1.bias": np.ones(64, complex)}, r"bn1\.bias")
    attempt(whole, "head", head="none")

    save(path, {**bare, "bn1.num_batches_tracked": np.array(7)})
    report = pretrained.load(net, path, allow_missing=["fc."])
    assert report.missing == ["fc.weight", "fc.bias"] and report.unexpected == []
    assert set(report.matched) == {k for k, v in bare.items() if v.ndim == 1}
    assert report.reshaped == [(k, v.shape, net.state()[k].shape) for k, v in bare.items()
                               if v.ndim > 1]
    assert "81 tensors" not in str(report) and "fc.bias (left as it was)" in str(report)
    after = net.state()
    assert np.array_equal(after["fc.weight"], before["fc.weight"])
    for name, array in bare.items():
        np.testing.assert_array_equal(foreign(after)[name], array)


def test_our_own_file_goes_in_too(tmp_path):
    net = awake(ts.models.resnet_seg(rank=2, in_channels=2, classes=3))
    ts.save(tmp_path / "a.npz", net)
    other = ts.models.resnet_seg(rank=2, in_channels=2, classes=5, seed=1)
    report = pretrained.load(other, tmp_path / "a.npz", head="drop")
    assert len(report.matched) == 100 and not report.reshaped and not report.missing
    for name, array in other.state().items():
        assert name.startswith("fc.") or np.array_equal(array, net.state()[name])


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """(a rank-2 network of RGB images, its checkpoint), in float64."""
    net = awake(ts.models.resnet_seg(rank=2, in_channels=3, classes=2), dtype="float64")
    path = save(tmp_path_factory.mktemp("rgb") / "a.npz", foreign(net.state()))
    yield net, path
    path.unlink()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_rgb_stems(rgb, channels):
    """Grey images g in `channels` equal channels, against the RGB network."""
    net, path = rgb
    new = ts.models.resnet_seg(rank=2, in_channels=channels, classes=2).astype("float64")
    g = np.random.default_rng(channels).random((2, 29, 34, 1))
    grey = np.repeat(g, channels, axis=-1)

    assert any("RGB stem" in note for note in pretrained.load(new, path, stem="sum").notes)
    assert close(evaluate(new, grey), evaluate(net, np.repeat(g, 3, axis=-1)), 1e-10)
    pretrained.load(new, path, stem="mean")  # the RGB network on a third of the image
    assert close(evaluate(new, 3 * grey), evaluate(net, np.repeat(g, 3, axis=-1)), 1e-10)

    pretrained.load(new, path, stem="imagenet")  # zeros around raw and normalised images differ
    colours = (np.repeat(g, 3, axis=-1) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with ts.no_grad():
        a, b = new.bn1(new.conv1(ts.Tensor(grey))).data, net.bn1(net.conv1(ts.Tensor(colours))).data
    assert close(a[:, 2:-2, 2:-2], b[:, 2:-2, 2:-2], 1e-10) and not close(a, b, 1e-3)
    with pytest.raises(ValueError, match="stem is 'median'"):
        pretrained.load(new, path, stem="median")


# -- batch-norm ------------------------------------------------------------------------------------

def little(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    net = Sequential(Conv(2, 4, (3, 3), padding=1, rng=rng), BatchNorm(4), ReLU(),
                     Conv(4, 3, (3, 3), stride=2, rng=rng), BatchNorm(3))
    return awake(net, seed, dtype)


def batches():
    return [3 + 2 * normal(n, h, w, 2, dtype="float64")
            for n, h, w in ((3, 9, 7), (1, 12, 5), (2, 6, 6))]


def layers(net):
    return [m for _, m in net.named(BatchNorm)]


def test_recalibrate():
    net = little()
    before, x = [evaluate(net, b) for b in batches()], normal(2, 8, 9, 2, dtype="float64")
    inputs = [[], []]
    for batch in batches():  # what enters each batch-norm, recomputed
        first = net._arrays() and vars(net)["0"](ts.Tensor(batch))
        second = vars(net)["3"](vars(net)["2"](vars(net)["1"](first)))
        for rows, tensor in zip(inputs, (first, second), strict=True):
            rows.append(tensor.data.reshape(-1, tensor.shape[-1]))
    y = evaluate(net, x)
    pretrained.recalibrate(net, iter(batches()))
    assert close(evaluate(net, x), y, 1e-10)
    for batch, wanted in zip(batches(), before, strict=True):
        assert close(evaluate(net, batch), wanted, 1e-10)
    for layer, rows in zip(layers(net), inputs, strict=True):
        rows = np.concatenate(rows)
        np.testing.assert_allclose(layer.running_mean, rows.mean(axis=0), rtol=1e-11)
        np.testing.assert_allclose(layer.running_var, rows.var(axis=0), rtol=1e-11)


def test_train_mode_then_agrees_on_the_calibration_batch():
    net, batch = little(), batches()[0]
    y = evaluate(net, batch)
    assert not close(net.copy().train()(batch).data, y, 1e-2)
    pretrained.recalibrate(net, [batch])
    stats = [(m.running_mean.copy(), m.running_var.copy()) for m in layers(net)]
    assert close(net.train()(batch).data, y, 1e-9)
    for layer, (mean, var), n in zip(layers(net), stats, (3 * 9 * 7, 3 * 4 * 3), strict=True):
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-9)
        np.testing.assert_allclose(layer.running_var, var * (0.9 + 0.1 * n / (n - 1)), rtol=1e-9)


def test_recalibrate_repeats_itself_and_leaves_what_has_no_batch_norm():
    net = little()
    pretrained.recalibrate(net, batches())
    once = net.state()
    pretrained.recalibrate(net, batches())
    for name, array in net.state().items():
        np.testing.assert_allclose(array, once[name], rtol=1e-9, atol=1e-12)
    plain = Sequential(ReLU())
    pretrained.recalibrate(plain, [])
    single = awake(Sequential(BatchNorm(2)), dtype="float64").__dict__["0"]  # the network itself
    y = evaluate(single, batches()[0])
    pretrained.recalibrate(single, batches())
    assert close(evaluate(single, batches()[0]), y, 1e-12)


@pytest.mark.parametrize("fails", ["no batch", "iterator", "shape"])
def test_recalibrate_puts_everything_back(fails):
    net = little()
    first, second = layers(net)
    first.training, second.training, net.training = True, False, True
    before, rng = net.state(), np.random.default_rng(0)

    def some():
        if fails == "no batch":
            return
        yield batches()[0]
        if fails == "iterator":
            raise OSError("gone")
        yield rng.random((1, 9, 9, 5))

    with pytest.raises(OSError if fails == "iterator" else ValueError,
                       match="batch" if fails == "no batch" else None):
        pretrained.recalibrate(net, some())
    assert (first.training, second.training, net.training) == (True, False, True)
    assert all("forward" not in vars(m) for m in layers(net)) and unchanged(net, before)
    pretrained.recalibrate(net, batches())
    assert (first.training, second.training) == (True, False)
    assert all("forward" not in vars(m) for m in layers(net))


def test_folded_statistics_are_noticed(tmp_path, states):
    state = {k: np.zeros_like(v) if k.endswith("mean") else np.ones_like(v)
             if k.endswith("var") else v for k, v in states["resnet18"].items()}
    path = save(tmp_path / "a.npz", state)
    for channels, stem in ((3, "sum"), (1, "sum"), (1, "imagenet")):
        net = ts.models.resnet(rank=2, in_channels=channels, classes=4)
        with pytest.warns(UserWarning, match="folded.*recalibrate") as caught:
            report = pretrained.load(net, path, stem=stem)
        assert caught[0].filename == __file__ and "folded" in report.notes[-1]
    net.train(statistics="running")
    assert net.training and not any(m.training for m in layers(net))
    pretrained.recalibrate(net, [normal(2, 40, 40, 1)])
    ts.save(tmp_path / "b.npz", net)
    for good in (save(path, states["resnet18"]), tmp_path / "b.npz"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            channels = 3 if good == path else 1
            pretrained.load(ts.models.resnet(rank=2, in_channels=channels, classes=4), good)


# -- real weights ----------------------------------------------------------------------------------

def photograph(name, side, crop=224):
    """A photograph of scikit-image as torchvision prepares it: (1, crop, crop, 3)."""
    skimage = pytest.importorskip("skimage")
    image = getattr(skimage.data, name)()[..., :3] / 255
    size = [int(n * side / min(image.shape[:2]) + 1e-9) for n in image.shape[:2]]
    image = skimage.transform.resize(image, size, order=1, anti_aliasing=True)
    top, left = (round((n - crop) / 2) for n in size)
    image = image[top : top + crop, left : left + crop]
    return ((image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype("float32")[None]


def import_real(net, path, **options):
    with pytest.warns(UserWarning, match="folded"):
        pretrained.load(net, path, **options)
    return net.eval()


@needs_torch
@pytest.mark.parametrize("backbone", IMAGENET)
def test_photographs(weights, backbone):
    """As PyTorch, whatever it says; and right: 285 Egyptian cat, 967 espresso.

    At 256/224 this ResNet-18 says 282, tiger cat, in PyTorch too (0.46 against 0.35); with the
    short side at 224, so that the whole cat is seen, it is right.
    """
    path = weights(IMAGENET[backbone])
    net = import_real(ts.models.resnet(backbone, rank=2, in_channels=3, classes=1000), path)
    model = Net(backbone, 2, 3, 1000, "classify", output_stride=32).eval()
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    answers = {}
    for name, side in (("chelsea", 256), ("chelsea", 224), ("coffee", 256)):
        x = photograph(name, side)
        y, z = evaluate(net, x), forward(model, x)
        assert close(y, z, 1e-4)
        assert y.argmax() == z.argmax()
        answers[name, side] = int(y.argmax())
    assert answers["chelsea", 224] == 285 and answers["coffee", 256] == 967
    assert answers["chelsea", 256] == (285 if backbone == "resnet50" else 282)


def segmenter(weights, backbone, channels=3):
    net = ts.models.resnet_seg(backbone, rank=2, in_channels=channels, classes=3, seed=4)
    return import_real(net, weights(IMAGENET[backbone]), head="drop")


def test_recalibrated_on_photographs(weights):
    net = segmenter(weights, "resnet18")
    x = photograph("chelsea", 256, 96)
    y = evaluate(net, x)
    trained = net.copy().train()(x).data
    names = ("astronaut", "coffee", "chelsea", "rocket")
    pretrained.recalibrate(net, [photograph(name, 160, 96) for name in names])
    assert close(evaluate(net, x), y, 1e-4)
    assert not pretrained.mapping.folded(net)
    again = net.copy().train()(x).data  # train mode keeps working, where it did not
    assert np.abs(again - y).mean() < np.abs(trained - y).mean() / 2


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_kernels_of_volumes_with_other_slots_keep_their_sum(slots):
    net, w = Conv(2, 4, (slots, 3, 3), bias=False, rng=0), normal(4, 2, 3, 3, 3)
    if slots != 3:
        with pytest.raises(ValueError, match=r"weight has shape \(4, 2, 3, 3, 3\)"):
            pretrained.load(net, {"weight": w})
    pretrained.load(net, {"weight": w}, resample=True)
    before, found = np.moveaxis(w, (1, 0), (-2, -1)), net.weight.data
    assert close(found.sum(axis=0), before.sum(axis=0), 1e-6)
    if slots == 5:  # the slots of three stand at 1/3, 2 and 11/3 of five
        a, b, c = before
        assert close(found, np.stack([2 * a / 3, a / 3, b, c / 3, 2 * c / 3]), 1e-6)
    if slots == 3:
        assert (found == before.astype("float32")).all()


EXACT = [name for name, row in PROFILES.items() if row.exact and row.structure == "full"]
DEEP = pytest.param("resnet50", marks=pytest.mark.slow)


@pytest.mark.parametrize("backbone", ["resnet18", DEEP])
def test_inflated_real_weights_on_constant_depth(weights, backbone):
    net = segmenter(weights, backbone)
    x = photograph("chelsea", 224, 33)
    y = evaluate(net, x)
    for profile in EXACT:
        z = evaluate(ts.inflate(net, 3, profile), np.repeat(x[:, None], 3, axis=1))
        assert close(z, np.repeat(y[:, None], 3, axis=1), 1e-4), profile
    z = evaluate(ts.inflate(net, 3, "replicate"), np.repeat(x[:, None], 3, axis=1))
    assert not close(z, np.repeat(y[:, None], 3, axis=1), 0.1)


@pytest.mark.parametrize("backbone", ["resnet18", DEEP])
def test_inflated_real_weights_slice_by_slice_on_a_scan(weights, backbone):
    if not CT.exists():
        pytest.skip("the real CT is not here")
    scan = ts.data.nifti.read(CT).array
    x = scan[13:17, 20:69, 30:71].astype("float32").clip(-160, 240)[None, ..., None]
    x = (x - x.mean()) / x.std()
    net = segmenter(weights, backbone, channels=1)
    deep = ts.inflate(net, 3, "zero", slot="center", depth_stride=1)
    y, slices = evaluate(deep, x)[0], evaluate(net, x[0])
    assert close(y, slices, 1e-4)
    assert not close(slices[1:], slices[:-1], 1e-2)  # the slices are not all the same


# -- python -m tinyseg convert ---------------------------------------------------------------------

@needs_torch
def test_convert(tmp_path, capsys):
    torch.manual_seed(3)
    model = wake(Net("resnet18", 2, 3, 2, "linear"))
    source, target = tmp_path / "resnet_18_8s_59.pth", tmp_path / "net.npz"
    torch.save({f"resnet18_8s.{k}": v for k, v in model.state_dict().items()}, source)
    done = subprocess.run([sys.executable, "-m", "tinyseg", "convert", source, target], text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 missing, 0 not used" in done.stdout and str(target) in done.stdout
    net = ts.load(target)
    assert net.config["backbone"] == "resnet18" and net.config["classes"] == 2
    assert net.metadata["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert net.metadata["source"] == source.name and net.metadata["report"] in done.stdout
    assert net.metadata["normalisation"] == {"mean": [0.485, 0.456, 0.406],
                                             "std": [0.229, 0.224, 0.225]}
    x = normal(1, 37, 51, 3)
    assert close(evaluate(net, x), forward(model, x), 1e-4)


def test_convert_refuses(tmp_path, capsys, states):
    good, bad = save(tmp_path / "good.npz", states["resnet18"]), tmp_path / "bad.pth"
    bad.write_bytes(zipped(b"\x80\x02cos\nsystem\n(" + text("true") + b"tR."))
    bare = save(tmp_path / "bare.npz", {k: v for k, v in states["resnet18"].items()
                                        if not k.startswith("fc.")})
    odd = save(tmp_path / "odd.npz", {**states["resnet18"], "bn1.bias": np.ones(3)})
    target = tmp_path / "net.npz"
    for source, to, message in (
        (tmp_path / "none.pth", target, "none.pth"), (good, tmp_path / "net.pth", "net.pth.*.npz"),
        (bad, target, "bad.pth.*system"), (bare, target, "bare.npz.*without a head"),
        (odd, target, "odd.npz"), (good, tmp_path / "no" / "net.npz", "no"),
    ):
        assert main(["convert", str(source), str(to)]) == 1
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and not to.exists()
        assert re.search(message, told.err), told.err
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(good)])
    assert caught.value.code == 2

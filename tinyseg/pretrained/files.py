"""Arrays out of other people's checkpoints, without running anything that a file says.

What a PyTorch file's pickles may ask for stands in `pickles`; nothing else is ever called.

Sizes are believed only after they were compared with the file: nothing is allocated that the file
does not hold, and tensors are views of their storages, however many share one.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..files import DEFLATE, identify
from .pickles import BFLOAT16, LONGEST_NAME, Inert, Kind, Storage, Strided, Unpickler

LARGEST_PICKLE = 64 << 20  # bytes; that of ResNet-152 has 0.1 MB
LARGEST_ARCHIVE = 16 << 30  # bytes, unpacked, of an .npz
MOST_REPEATED = 1 << 17  # entries of dicts that several dicts hold
MAGIC = 0x1950A86A20F9469CFC6C  # opens PyTorch's format from before 1.6

OTHERS = (  # how files begin that are met in a checkpoint's place beside what `identify` knows
    (b"{", "JSON text, no weights; where it is the index of several files (model.safetensors.index"
           ".json), read each of them and load their union: load(net, read(a) | read(b))"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"\x89HDF", "HDF5, as Keras has it; expected PyTorch's format, safetensors or npz"),
)


class Bounded(io.RawIOBase):
    """A file that refuses to read more than it has left, before memory is taken for it."""

    def __init__(self, file: Any, size: int):
        self.file, self.left = file, size

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError(f"{count} bytes were asked for where {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def readline(self, limit: int | None = -1) -> bytes:
        line = self.file.readline(min(self.left, 1 << 16))
        self.left -= len(line)
        return line


def _numbers(raw: bytes, kind: Kind) -> np.ndarray:
    """A storage's bytes as an array; bfloat16 widened to float32, exactly."""
    stored = np.frombuffer(raw, kind.stored)
    if kind.name == BFLOAT16:
        return (stored.astype("u4") << 16).view("f4")
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _dicts(found: Any) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(path, dict) of a dict and those that it holds under names, down to the eighth level."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), found)]
    seen, again = set(), 0
    while stack:
        path, held = stack.pop()
        if not isinstance(held, dict):
            continue
        again += (1 + len(held)) * (id(held) in seen)
        if again > MOST_REPEATED:
            raise ValueError("its dicts hold each other again and again")
        seen.add(id(held))
        yield path, held
        if len(path) < 8:
            stack += [((*path, key), value) for key, value in reversed(held.items())
                      if isinstance(key, str) and isinstance(value, dict)]


def _state_dict(unpickler: Unpickler) -> dict[str, Strided]:
    """The names and tensors in what the pickle holds, behind where they stand if several dicts
    have some. A dotted name of a tensor with axes makes a dict a state dict; if none is, any."""
    found = [(path, {key: value for key, value in held.items() if isinstance(value, Strided)
                     or isinstance(value, Inert) and value.tensor})
             for path, held in _dicts(unpickler.load())]
    for tells in (lambda key, value: "." in key and isinstance(value, Strided) and value.size,
                  lambda key, value: isinstance(value, Strided), lambda key, value: True):
        states = [(path, tensors) for path, tensors in found if any(
            isinstance(key, str) and tells(key, value) for key, value in tensors.items())]
        if states:
            break
    else:
        asked = ", ".join(list(unpickler.foreign)[:3])
        raise ValueError("it holds no state dict, names with tensors" + (
            f"; it asks for {asked}, which was not run. Save the state dict alone: "
            "torch.save(net.state_dict(), path)" if asked else ""))
    named: dict[str, Strided] = {}
    for path, tensors in states:
        for key, value in tensors.items():
            parts = (*path, key) if len(states) > 1 else (key,)
            if not isinstance(key, str) or sum(map(len, parts)) > LONGEST_NAME:
                raise ValueError("the name of a tensor is no text, or too long")
            name = ".".join(parts)
            if name in named:
                raise ValueError(f"two of its tensors are called {name}")
            if isinstance(value, Inert):
                raise ValueError(f"{name} is a tensor of a kind that is not supported "
                                 f"({value.name}, which was not run); save the others alone")
            named[name] = value
    return named


def _views(tensors: dict[str, Strided], load: Callable[[Storage], bytes]) -> dict:
    arrays, numbers = {}, {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage not in numbers:
            numbers[storage] = _numbers(load(storage), storage.kind)
        arrays[name] = tensor.view(numbers[storage])
    return arrays


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """PyTorch since 1.6: a zip of data.pkl and one stored member for every storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("a zip archive without data.pkl; expected PyTorch's format or npz")
        root = found[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise ValueError("TorchScript, a program with its weights; save these alone: "
                             "torch.save(torch.jit.load(path).state_dict(), another_path)")
        left = path.stat().st_size
        if len(members) < len(archive.infolist()):
            raise ValueError("two of its members have the same name")

        def member(name, size=None):
            nonlocal left
            info = members.get(root + name)
            if info is None:
                raise ValueError(f"its member {name} is missing")
            if info.compress_type != zipfile.ZIP_STORED or not (
                info.file_size == info.compress_size <= left
            ):
                raise ValueError(f"its member {name} is compressed or larger than the file")
            if size is not None and info.file_size != size:
                raise ValueError(f"its member {name} has {info.file_size} bytes, expected {size}")
            left -= info.file_size
            return archive.read(info)

        if f"{root}byteorder" in members and member("byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine; save it again on another")
        if members[found[0]].file_size > LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has over {LARGEST_PICKLE} bytes")
        tensors = _state_dict(Unpickler(io.BytesIO(member("data.pkl"))))
        return _views(tensors, lambda s: member(f"data/{s.key}", s.numel * s.kind.stored.itemsize))


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """PyTorch before 1.6: pickles of a magic number, a version, the machine, the object and the
    storages' keys, then for each key its length and its numbers."""
    with open(path, "rb") as file:
        bounded = Bounded(file, path.stat().st_size)
        magic, version, machine = (Unpickler(bounded).load() for _ in range(3))
        if magic != MAGIC or version != 1001:
            raise ValueError("it is no PyTorch file: its magic number is another")
        if not (isinstance(machine, dict) and machine.get("little_endian", True)):
            raise ValueError("it was written on a big-endian machine; save it again on another")
        body = Unpickler(bounded)
        tensors = _state_dict(body)
        used = {tensor.storage.key for tensor in tensors.values()}
        raw = {}
        for key in Unpickler(bounded).load():
            if not isinstance(key, str) or key not in body.kinds:
                raise ValueError("it holds a storage that no tensor refers to")
            if isinstance(kind := body.kinds[key], Inert):
                raise ValueError(f"it holds a {kind.name}, which is not supported")
            count = struct.unpack("<q", bounded.read(8))[0]
            numbers = bounded.read(count * kind.stored.itemsize)
            if key in used:  # the others belong to an optimiser
                raw[key] = numbers
        for tensor in tensors.values():
            if len(raw.get(tensor.storage.key, b"")) != (
                tensor.storage.numel * tensor.storage.kind.stored.itemsize
            ):
                raise ValueError(f"its storage {tensor.storage.key} is missing or incomplete")
        return _views(tensors, lambda s: raw[s.key])


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import deserialize
    except ImportError:
        raise RuntimeError(f"{path}: needs the safetensors package: pip install "
                           "tinyseg[safetensors]") from None
    codes = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": BFLOAT16, "I64": "i8", "I32": "i4",
             "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1",
             "BOOL": "?"}
    arrays = {}
    for name, told in sorted(deserialize(path.read_bytes()), key=itemgetter(0)):
        if told["dtype"] not in codes:
            raise ValueError(f"{name} is of type {told['dtype']}, which is not supported")
        arrays[name] = _numbers(told["data"], Kind(codes[told["dtype"]])).reshape(told["shape"])
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(info.file_size for info in members) > LARGEST_ARCHIVE:
            raise ValueError(f"it unpacks to over {LARGEST_ARCHIVE >> 30} GiB")
        if len({info.filename for info in members}) < len(members):
            raise ValueError("two of its members have the same name")
        arrays = {}
        for info in members:
            most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE}.get(info.compress_type, 0)
            if info.compress_size > size or info.file_size > most * info.compress_size:
                raise ValueError(f"{info.filename} claims more than {size} bytes can hold")
            with archive.open(info) as file:  # what the header claims must be what is there
                version = np.lib.format.read_magic(file)
                header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                          else np.lib.format.read_array_header_2_0)
                shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise ValueError(f"{info.filename} holds Python objects, which are not read; "
                                     "save the arrays without it")
                if file.tell() + prod(shape) * dtype.itemsize != info.file_size:
                    raise ValueError(f"{info.filename} claims shape {shape} and is of another size")
            with archive.open(info) as file:
                name = info.filename.removesuffix(".npy")
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays


def read(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a checkpoint, with the file's own names, layout and dtype.

    These are the names in the file's state dict, wherever it stands; other tensors (an optimiser's,
    a figure's) are no weights. Where there are several, names say where: "teacher.conv1.weight",
    "student.conv1.weight". Tensors that repeat fewer numbers stay views of these.

    .pth, .pt, .th (both of PyTorch's formats), .safetensors, .npz; what the file is decides, not
    its name. bfloat16 is widened to float32. Arrays may be read-only and may share memory. Nothing
    in the file is ever executed.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong with it: other
    content than names with tensors, damage, sizes that the file does not hold. RuntimeError where
    a package for the format is not installed.

    >>> np.savez("net.npz", **{"conv1.weight": np.ones((64, 3, 7, 7))})
    >>> {name: array.shape for name, array in ts.pretrained.read("net.npz").items()}
    {'conv1.weight': (64, 3, 7, 7)}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" if not path.is_dir() else
                                f"{path}: a folder; expected the file in it that holds the weights")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):  # two letters could be a length in safetensors
            with zipfile.ZipFile(path) as archive:
                plain = all(name.endswith(".npy") for name in archive.namelist())
            arrays = _read_npz(path) if plain else _read_zip(path)
        elif head[7:9] == b"\0{":  # after the length of its JSON
            arrays = _read_safetensors(path)
        elif head[257:262] == b"ustar":
            raise ValueError("a tar archive, PyTorch's format before 0.2; load it with PyTorch and "
                             "save it again")
        elif head[:1] == b"\x80":  # every pickle since protocol 2
            arrays = _read_legacy(path)
        else:
            what = [what for begins, what in OTHERS if head.lstrip().startswith(begins)]
            raise ValueError(identify(head) or "".join(what)
                             or "neither PyTorch's format nor safetensors nor npz")
        if not arrays:
            raise ValueError("it holds no array")
    except RuntimeError as error:
        if "safetensors package" in str(error):
            raise
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error})") from None
    except MemoryError:
        raise ValueError(f"{path}: needs more memory than there is") from None
    except Exception as error:  # zip, zlib, pickle and struct each raise their own on damage
        told = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: cannot be read as a checkpoint ({told})") from None
    return arrays

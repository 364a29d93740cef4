"""Arrays out of other people's checkpoints, without running anything that a file says.

What a PyTorch file's pickles may ask for stands in `pickles`; nothing else is ever called.

Sizes are believed only after they were compared with the file: nothing is allocated that the file
does not hold, and tensors are views of their storages, however many share one.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from .pickles import BFLOAT16, Kind, Storage, Strided, Unpickler

LARGEST_PICKLE = 64 << 20  # bytes; that of ResNet-152 has 0.1 MB
LARGEST_ARCHIVE = 16 << 30  # bytes, unpacked, of an .npz
DEFLATE = 1032  # bytes out of one, at most
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights
MAGIC = 0x1950A86A20F9469CFC6C  # opens PyTorch's format from before 1.6


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


def _state_dict(found: Any) -> dict[str, Strided]:
    """The names and tensors in what was unpickled, out of the wrappers around them."""
    for _ in range(8):  # a dict may hold itself
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), dict)
                 ] if isinstance(found, dict) else []
        found = inner[0] if inner else found
    tensors = {key: value for key, value in found.items() if isinstance(value, Strided)
               } if isinstance(found, dict) else {}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError("it holds no state dict: names with tensors, perhaps under "
                         + " or ".join(WRAPPERS))
    return tensors


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
            raise ValueError("the zip archive has no data.pkl; a TorchScript or other archive?")
        root = found[0].removesuffix("data.pkl")
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
        tensors = _state_dict(Unpickler(io.BytesIO(member("data.pkl"))).load())
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
        tensors = _state_dict(body.load())
        used = {tensor.storage.key for tensor in tensors.values()}
        raw = {}
        for key in Unpickler(bounded).load():
            if not isinstance(key, str) or key not in body.kinds:
                raise ValueError("it holds a storage that no tensor refers to")
            count = struct.unpack("<q", bounded.read(8))[0]
            numbers = bounded.read(count * body.kinds[key].stored.itemsize)
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
                if file.tell() + prod(shape) * dtype.itemsize != info.file_size:
                    raise ValueError(f"{info.filename} claims shape {shape} and is of another size")
            with archive.open(info) as file:
                name = info.filename.removesuffix(".npy")
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays


def read(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a checkpoint, with the file's own names, layout and dtype.

    .pth, .pt, .th (both of PyTorch's formats), .safetensors, .npz; what the file is decides, not
    its name. bfloat16 is widened to float32. Arrays may be read-only and may share memory. Nothing
    in the file is ever executed.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong with it: other
    content than names with tensors, damage, sizes that the file does not hold. RuntimeError where
    a package for the format is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):  # two letters could be a length in safetensors
            with zipfile.ZipFile(path) as archive:
                plain = all(name.endswith(".npy") for name in archive.namelist())
            arrays = _read_npz(path) if plain else _read_zip(path)
        elif head[8:9] == b"{":  # after the length of its JSON
            arrays = _read_safetensors(path)
        elif head[257:262] == b"ustar":
            raise ValueError("a tar archive, PyTorch's format before 0.2; load it with PyTorch and "
                             "save it again")
        elif head[:1] == b"\x80":  # every pickle since protocol 2
            arrays = _read_legacy(path)
        else:
            raise ValueError("neither PyTorch's format nor safetensors nor npz")
        if not arrays:
            raise ValueError("it holds no array")
    except RuntimeError as error:
        if "safetensors package" in str(error):
            raise
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error})") from None
    except MemoryError:
        raise ValueError(f"{path}: needs more memory than there is") from None
    except Exception as error:  # zip, zlib, pickle and struct each raise their own on damage
        raise ValueError(f"{path}: cannot be read as a checkpoint "
                         f"({type(error).__name__}: {error})") from None
    return arrays

"""Pickles of state dicts, read as data.

A pickle is a program for a small stack machine that may call any function by name. Ours knows the
dozen names that a state dict needs, and refuses a file that asks for another. What they stand for
here are inert objects: a storage's type, and the geometry of a tensor over it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

BFLOAT16 = "bfloat16"  # the upper half of a float32
KINDS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Long": "i8",
         "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
DTYPES = {"uint16": "u2", "uint32": "u4", "uint64": "u8"}  # kinds that have no storage type
UNWANTED = {pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EMPTY_SET,
            pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ,
            pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4}  # opcodes of other pickles
EVEN = slice(0, None, 2)
MACHINE: Any = pickle._Unpickler  # in Python: its memo is a dict, which no file can blow up


@dataclass(frozen=True, slots=True)
class Kind:
    """The element type of a storage; stands for torch.FloatStorage and its like."""

    name: str

    @property
    def stored(self) -> np.dtype:
        return np.dtype("u2" if self.name == BFLOAT16 else self.name).newbyteorder("<")


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers somewhere in the file."""

    kind: Kind
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor as pickled: which numbers of a storage, in which shape. Strides in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, numbers: np.ndarray) -> np.ndarray:
        """The array over the storage's numbers, after a check that it stays inside."""
        if len(self.size) != len(self.stride):
            raise ValueError(f"a tensor of size {self.size} and stride {self.stride}")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if prod(self.size) and last >= len(numbers) or prod(self.size) > len(numbers):
            raise ValueError(f"a tensor of size {self.size}, stride {self.stride} and offset "
                             f"{self.offset} over a storage of {len(numbers)}")
        steps = [s * numbers.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.size, steps,
                                               writeable=False)


class Called:
    """A function that a pickle may call, by position only; without attributes to set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Ordered(dict):
    """collections.OrderedDict as state dicts use it: empty at first, its attributes ignored."""


def _integers(numbers: Any = ()) -> tuple[int, ...]:
    """A size or stride: few numbers of 63 bits, so that neither copies nor products grow."""
    if not isinstance(numbers, tuple | list) or len(numbers) > 32 or not all(
        type(n) is int and 0 <= n < 1 << 63 for n in numbers
    ):
        raise ValueError("a size, stride or offset that is none")
    return tuple(numbers)


def _tensor(storage, offset, size, stride, *_) -> Strided:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Strided(storage, _integers((offset,))[0], _integers(size), _integers(stride))


def _tensor_of_kind(storage, offset, size, stride, grad, hooks, kind, *_) -> Strided:
    if not isinstance(storage, Storage) or not isinstance(kind, Kind):
        raise ValueError("a tensor without a storage or an element type")
    flat = Storage(kind, storage.key, storage.numel // kind.stored.itemsize)
    return _tensor(flat, offset, size, stride)


ALLOWED = {
    "collections.OrderedDict": Called(lambda: Ordered()),
    "torch._utils._rebuild_tensor": Called(_tensor),
    "torch._utils._rebuild_tensor_v2": Called(_tensor),
    "torch._utils._rebuild_tensor_v3": Called(_tensor_of_kind),
    "torch._utils._rebuild_parameter": Called(lambda tensor, *_: tensor),
    "torch.Size": Called(_integers),
    "torch.storage.UntypedStorage": Kind("u1"),
    **{f"torch.{name}Storage": Kind(code) for name, code in KINDS.items()},
    **{f"torch.{name}": Kind(code) for name, code in DTYPES.items()},
}


def _plain_keys(load: Callable, keys: slice) -> Callable:
    """`load` for text and numbers as keys: hashing nested tuples can take for ever."""
    def checked(self):
        if not all(isinstance(k, str | bytes | int | float | None) for k in self.stack[keys]):
            raise ValueError("a key that is no text or number")
        load(self)
    return checked


class Unpickler(MACHINE):
    """Reads a pickle of plain dicts, lists, tuples, numbers and the names in ALLOWED.

    `kinds` collects the element types of the storages that the pickle refers to, by key. What
    the names stand for outlives the file: no file may set their attributes.
    """

    def load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Ordered):
            raise ValueError("it sets attributes of something that has none")

    def load_reduce(self) -> None:
        function, arguments = self.stack[-2:]
        if not isinstance(function, Called) or len(arguments) > 32:
            raise ValueError("it calls what is no function, or with too much")
        super().load_reduce()

    dispatch = {code: load for code, load in MACHINE.dispatch.items()
                if bytes([code]) not in UNWANTED}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.REDUCE[0]: load_reduce,
                 pickle.SETITEM[0]: _plain_keys(MACHINE.load_setitem, slice(-2, -1)),
                 pickle.SETITEMS[0]: _plain_keys(MACHINE.load_setitems, EVEN),
                 pickle.DICT[0]: _plain_keys(MACHINE.load_dict, EVEN)}

    def __init__(self, file: Any):
        super().__init__(file)
        self.kinds: dict[str, Kind] = {}

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in ALLOWED:
            raise ValueError(f"it asks for {wanted}, which no state dict needs; it was not run. "
                             "Save the state dict alone: torch.save(net.state_dict(), path)")
        return ALLOWED[wanted]

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, Kind) or not isinstance(key, str) or any(view):
            raise ValueError("it refers to a storage that is not plain")
        self.kinds[key] = kind
        return Storage(kind, key, _integers((numel,))[0])

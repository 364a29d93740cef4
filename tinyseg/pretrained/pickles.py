"""Pickles of state dicts, read as data.

A pickle is a program for a small stack machine that may call any function by name. Ours knows the
dozen names that weights need: a storage's type, the geometry of a tensor over it, a dict. Any other
name, and whatever it would make, is one inert object: training scripts keep much beside weights.
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
ATTACKS = {"os", "posix", "nt", "subprocess", "commands", "pty", "sys", "shutil", "socket",
           "importlib", "runpy", "ctypes"} | {f"{module}.{name}" for name in (
               "eval", "exec", "execfile", "compile", "open", "__import__")
               for module in ("builtins", "__builtin__")}  # no safety rests on this list
UNWANTED = {pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4}
LONGEST_NAME = 512  # characters
LARGEST_EXPANDED = 1 << 24  # numbers of a tensor that repeats its storage, as expand() makes them
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
        most = max(len(numbers), LARGEST_EXPANDED)
        if prod(self.size) and last >= len(numbers) or prod(self.size) > most:
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


class Inert:
    """What a name outside the table stands for, and what that makes: called, filled or given
    attributes to no effect. `tensor`: numbers of a storage went into it."""

    __slots__ = ("name", "tensor")

    def __init__(self, name: str, tensor: bool = False):
        self.name, self.tensor = name, tensor

    def swallow(self, *_: Any) -> None:
        """Forget what a pickle puts in."""

    append = extend = add = __setitem__ = swallow

    def of(self, arguments: Any, deep: bool = True) -> Inert:
        """What calling it with these makes; the first of them tell what it is."""
        for value in arguments[:4]:
            if isinstance(value, Storage | Strided) or isinstance(value, Inert) and value.tensor:
                return Inert(self.name, tensor=True)
            if deep and isinstance(value, tuple | list) and self.of(value, False).tensor:
                return Inert(self.name, tensor=True)
        return self


class Ordered(dict):
    """collections.OrderedDict as state dicts use it, its attributes ignored."""


def _plain(key: Any) -> Any:
    """A key that hashes fast: nested tuples can take for ever, and name no weights."""
    return key if isinstance(key, str | bytes | int | float | None) else Inert(type(key).__name__)


def _ordered(*arguments: Any) -> Ordered:
    """Empty, or from [[key, value], ...] as Python 2 has it. The pairs are taken out of the list,
    which a pickle could hand over again and again."""
    if not arguments:
        return Ordered()
    pairs, = arguments
    if not isinstance(pairs, list):
        raise ValueError("a dict of what is no list of pairs")
    made = Ordered((_plain(key), value) for key, value in pairs)
    pairs.clear()
    return made


def _integers(numbers: Any = ()) -> tuple[int, ...]:
    """A size or stride: few numbers of 63 bits, so that neither copies nor products grow."""
    if not isinstance(numbers, tuple | list) or len(numbers) > 32 or not all(
        type(n) is int and 0 <= n < 1 << 63 for n in numbers
    ):
        raise ValueError("a size, stride or offset that is none")
    return tuple(numbers)


def _tensor(storage, offset, size, stride, *_) -> Strided | Inert:
    if isinstance(storage, Inert):
        return Inert(storage.name, tensor=True)
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Strided(storage, _integers((offset,))[0], _integers(size), _integers(stride))


def _tensor_of_kind(storage, offset, size, stride, grad, hooks, kind, *_) -> Strided | Inert:
    if isinstance(kind, Inert):
        return Inert(kind.name, tensor=True)
    if not isinstance(storage, Storage) or not isinstance(kind, Kind):
        raise ValueError("a tensor without a storage or an element type")
    flat = Storage(kind, storage.key, storage.numel // kind.stored.itemsize)
    return _tensor(flat, offset, size, stride)


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Inert):
        return function.of(arguments)
    if not isinstance(function, Called) or len(arguments) > 32:
        raise ValueError("it calls what is no function, or with too much")
    return function.function(*arguments)


ALLOWED = {
    "collections.OrderedDict": Called(_ordered),
    "collections.defaultdict": Called(lambda *_: Ordered()),
    "torch._tensor._rebuild_from_type_v2": Called(lambda make, kind, given, *_: _call(make, given)),
    "torch._utils._rebuild_tensor": Called(_tensor),
    "torch._utils._rebuild_tensor_v2": Called(_tensor),
    "torch._utils._rebuild_tensor_v3": Called(_tensor_of_kind),
    "torch._utils._rebuild_parameter": Called(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": Called(lambda tensor, *_: tensor),
    "torch.Size": Called(_integers),
    "torch.storage.UntypedStorage": Kind("u1"),
    **{f"torch.{name}Storage": Kind(code) for name, code in KINDS.items()},
    **{f"torch.{name}": Kind(code) for name, code in DTYPES.items()},
}


def _plain_keys(load: Callable, keys: slice) -> Callable:
    def replaced(self):
        self.stack[keys] = map(_plain, self.stack[keys])
        load(self)
    return replaced


class Unpickler(MACHINE):
    """Reads a pickle of dicts, lists, tuples, numbers and the names in ALLOWED; all else is inert.

    `kinds` collects the element types of the storages that the pickle refers to, by key, and
    `foreign` the names that are not in the table. What the names stand for outlives the file: no
    file may set their attributes.
    """

    def load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Ordered | Inert):
            raise ValueError("it sets attributes of something that has none")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # its arguments by name
        self.load_reduce()

    def load_empty_set(self) -> None:
        self.append(Inert("set"))

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert("frozenset"))

    def _instantiate(self, function: Any, arguments: list) -> None:
        self.append(_call(function, arguments))

    dispatch = {code: load for code, load in MACHINE.dispatch.items()
                if bytes([code]) not in UNWANTED}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.REDUCE[0]: load_reduce,
                 pickle.NEWOBJ[0]: load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex,
                 pickle.EMPTY_SET[0]: load_empty_set, pickle.FROZENSET[0]: load_frozenset,
                 pickle.BYTEARRAY8[0]: MACHINE.load_binbytes8,  # read before memory is taken
                 pickle.SETITEM[0]: _plain_keys(MACHINE.load_setitem, slice(-2, -1)),
                 pickle.SETITEMS[0]: _plain_keys(MACHINE.load_setitems, EVEN),
                 pickle.DICT[0]: _plain_keys(MACHINE.load_dict, EVEN)}

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8", errors="backslashreplace")  # Python 2's text
        self.kinds: dict[str, Kind | Inert] = {}
        self.foreign: dict[str, Inert] = {}

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if len(wanted) > LONGEST_NAME:
            raise ValueError(f"it asks for a name of {len(wanted)} characters")
        if wanted in ATTACKS or wanted.partition(".")[0] in ATTACKS:
            raise ValueError(f"it asks for {wanted}, as an attack does and no weights need; it was "
                             "not run. Trust no file from where this one came")
        return ALLOWED.get(wanted) or self.foreign.setdefault(wanted, Inert(wanted))

    def persistent_load(self, pid: Any) -> Storage | Inert:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and isinstance(pid[1], Inert):
            return pid[1]  # with its source, as PyTorch had it until 1.6
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, Kind | Inert) or not isinstance(key, str) or any(view):
            raise ValueError("it refers to a storage that is not plain")
        self.kinds[key] = kind
        if isinstance(kind, Inert):
            return Inert(kind.name, tensor=True)
        return Storage(kind, key, _integers((numel,))[0])

"""An array type that mixes with NumPy as little as CuPy's does, and libraries of such arrays.

A strict array wraps a NumPy array but refuses every implicit conversion: `asarray` is the only way
in, `get` the only way out, and it offers only names that CuPy has. Code that calls NumPy where it
should ask `array_module` fails on it, without a GPU. As a device, its library runs CUDA sources in
the emulator, on memory that shows what is read unwritten and what is accessed out of bounds.
"""

import operator
from contextlib import nullcontext
from functools import cache
from types import ModuleType, SimpleNamespace

import emulator
import numpy as np

FUNCTIONS = """abs arange argmax array ascontiguousarray bincount broadcast_to concatenate copyto
    dot empty einsum empty_like equal exp flip full isfinite log matmul maximum mean minimum
    moveaxis multiply ones ones_like pad result_type sign sqrt stack subtract sum tanh tensordot
    transpose where zeros zeros_like""".split()
METHODS = "all any argmax astype copy max mean min ravel reshape sum swapaxes transpose".split()
PROPERTIES = "T dtype flags itemsize nbytes ndim shape size strides".split()
GUARDED = """array ascontiguousarray concatenate empty empty_like full ones ones_like stack zeros
    zeros_like""".split()


def refuse(*_, **__):
    raise TypeError("implicit conversion between NumPy and strict arrays")


class ndarray:
    """A NumPy array behind glass; results of every operation are wrapped, zero axes included."""

    __module__ = "strictarray"
    __slots__ = ("_array",)
    __array_ufunc__ = None
    __array__ = __array_function__ = refuse
    __hash__ = None

    def __init__(self, array):
        self._array = array

    def __getitem__(self, key):
        key = unwrap(key)
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, np.ndarray) for part in parts):  # a copy
            return wrap(taped(operator.getitem, [self._array, key]), type(self))
        view = self._array[key]
        view = self._array[(*parts, ...)] if isinstance(view, np.generic) else view  # of a number
        return wrap(view, type(self))

    def __setitem__(self, key, value):
        taped(operator.setitem, [self._array, unwrap(key), unwrap(value)])

    def __len__(self):
        return len(self._array)

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def get(self):
        if emulator.tape is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._array.copy()

    @property
    def data(self):
        return SimpleNamespace(ptr=self._array.ctypes.data, device_id=0)

    @property
    def base(self):
        base = self._array.base
        return base if isinstance(base, np.ndarray) else None

    @property
    def device(self):
        return SimpleNamespace(id=0)


def wrap(value, kind):
    return kind(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def unwrap(value):
    """What is behind the glass; NumPy arrays are refused, numbers, names and dtypes pass."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, list | tuple):
        return type(value)(map(unwrap, value))
    return refuse() if isinstance(value, np.ndarray) else value


def taped(function, args, options=None):
    """The value of a function, which a graph that is being captured will compute again, into the
    same memory."""
    value = function(*args, **(options or {}))
    value = np.asarray(value) if isinstance(value, np.generic) else value  # to be written again
    if emulator.tape is not None:
        def again():
            fresh = function(*args, **(options or {}))
            if isinstance(value, np.ndarray) and fresh is not value and value.flags.writeable:
                value[...] = fresh  # what may not be written, as of broadcast_to, is a view

        emulator.tape.append(again)
    return value


def lifted(function, kind):
    """A function of NumPy as one of strict arrays of the type `kind`."""
    def call(*args, **options):
        options = {name: unwrap(value) for name, value in options.items()}
        return wrap(taped(function, [*map(unwrap, args)], options), kind)

    return call


def method(function):
    return lambda self, *args, **options: lifted(function, type(self))(self, *args, **options)


def binary(function, swap=False, keep=False):
    def call(self, other):
        if not isinstance(other, ndarray | np.ndarray | np.generic | int | float):
            return NotImplemented
        pair = self._array, unwrap(other)
        result = taped(function, list(reversed(pair) if swap else pair))
        return self if keep else wrap(result, type(self))

    return call


for _name in "add sub mul truediv floordiv mod pow matmul and or xor".split():
    _plain = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", binary(_plain))
    setattr(ndarray, f"__r{_name}__", binary(_plain, swap=True))
    setattr(ndarray, f"__i{_name}__", binary(getattr(operator, f"__i{_name}__"), keep=True))
for _name in "eq ne lt le gt ge".split():
    setattr(ndarray, f"__{_name}__", binary(getattr(operator, f"__{_name}__")))
for _name in "neg pos abs invert".split():
    setattr(ndarray, f"__{_name}__", method(getattr(operator, f"__{_name}__")))
for _name in METHODS:
    setattr(ndarray, _name, method(getattr(np.ndarray, _name)))
for _name in PROPERTIES:
    setattr(ndarray, _name,
            property(lambda self, name=_name: wrap(getattr(self._array, name), type(self))))


def guarded(function):
    """The same function of NumPy, its result between guard pages and 0xFF where not written."""
    def call(*args, **options):
        result = function(*args, **options)
        if any(result is a for a in args):  # ascontiguousarray of what is
            return result
        return emulator.guarded(result, blank=function in (np.empty, np.empty_like))

    return call


class Stream:
    """Of launches, which run at once; and the graph that is captured on it."""

    entered: list = []

    def __init__(self, **_):
        self.record = self.wait_event = lambda *_: None

    ptr = property(id)

    def __enter__(self):
        self.entered.append(self)

    def __exit__(self, *_):
        self.entered.pop()

    def begin_capture(self):
        emulator.tape = self.tape = []

    def end_capture(self):
        emulator.tape = None
        return SimpleNamespace(launch=lambda: [work() for work in self.tape])


@cache
def library(name, device=False):
    """A library of strict arrays to register as sys.modules[`name`].

    As a device it takes CuPy's place: arrays are made between guard pages, empty ones hold NaN,
    and it runs CUDA.
    """
    made = ModuleType(name)
    made.ndarray = kind = type("ndarray", (ndarray,), {"__module__": name, "__slots__": ()})
    for f in FUNCTIONS:
        function = getattr(np, f)
        setattr(made, f, lifted(guarded(function) if device and f in GUARDED else function, kind))
    made.add = lifted(np.add, kind)
    made.add.at = lifted(np.add.at, kind)

    def asarray(a, dtype=None):
        if isinstance(a, ndarray):
            return a if dtype in (None, a.dtype) else a.astype(dtype)
        if device and emulator.tape is not None:
            raise RuntimeError("capturing: nothing can be copied from the host meanwhile")
        a = np.array(a, dtype)  # another memory: always a copy
        return kind(emulator.guarded(a) if device else a)

    made.asarray = asarray
    if device:
        default = Stream()
        kind.copy = method(guarded(np.ndarray.copy))
        kind.astype = method(guarded(np.ndarray.astype))
        made.RawModule = emulator.RawModule
        made.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
        made.cuda = SimpleNamespace(
            Device=lambda i=0: SimpleNamespace(
                id=i, compute_capability="90", attributes={"MultiProcessorCount": 132},
                use=lambda: None),
            Stream=Stream, get_current_stream=lambda: [default, *Stream.entered][-1],
            using_allocator=lambda _: nullcontext(),
            MemoryPool=lambda: SimpleNamespace(malloc=None),
            runtime=SimpleNamespace(getDevice=lambda: 0, getDeviceCount=lambda: 1))
    return made

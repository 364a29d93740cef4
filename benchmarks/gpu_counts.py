"""What a training step asks of a GPU, counted without one: launches, reads by the host, products.

A step of each network runs on hollow arrays, which have a shape and no numbers, so that every
launch is made with its real grid and geometry and none computes. From those follow the fragments
(16 x 8 x 8 products, one instruction of a warp) that the convolutions on tensor cores multiply,
beside what they would without leaving out the taps that lie in the padding of a whole tile.

  python benchmarks/gpu_counts.py                 writes benchmarks/results/gpu/counts.md
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

import tinyseg as ts  # noqa: E402
from tinyseg import losses  # noqa: E402
from tinyseg.cuda import loader  # noqa: E402
from tinyseg.windows.kernels import GEOMETRY, LINE, ROWS  # noqa: E402

CASES = {"2x40x224x224 isotropic": (2, (40, 224, 224), {}),
         "2x40x224x224 inflated": (2, (40, 224, 224),
                                   {"depth": 3, "depth_stride": 1, "depth_dilation": 1}),
         "1x96x96x96 isotropic": (1, (96, 96, 96), {})}
CLASSES = 3


class Hollow:
    """An array of a library that looks like CuPy's, without numbers; `asked` counts what was done
    with such arrays other than by a kernel of ours."""

    __module__ = "cupy"
    data = SimpleNamespace(ptr=4096, device_id=0)
    device = SimpleNamespace(id=0)
    asked: Counter = Counter()

    def __init__(self, shape, dtype="float32", strides=None, base=None):
        self.shape = tuple(shape) if hasattr(shape, "__iter__") else (shape,)
        self.dtype, self.base = np.dtype(dtype), base
        self.strides = strides or tuple(
            prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape)))
        self.flags = SimpleNamespace(c_contiguous=strides is None)

    size = property(lambda self: prod(self.shape))
    ndim = property(lambda self: len(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)

    def __len__(self):
        return self.shape[0]

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = prod(n for n in shape if n >= 0)
        return Hollow([self.size // known if n < 0 else n for n in shape], self.dtype, base=self)

    def swapaxes(self, a, b):
        shape, strides = list(self.shape), list(self.strides)
        for values in shape, strides:
            values[a], values[b] = values[b], values[a]
        return Hollow(shape, self.dtype, tuple(strides), self)

    def __getitem__(self, key):
        key = key if isinstance(key, tuple) else (key,)
        view = np.lib.stride_tricks.as_strided(np.empty(0, self.dtype), self.shape, self.strides)
        view = view[key]  # nothing is read
        return Hollow(view.shape, self.dtype, view.strides, self)

    def _read(self):
        Hollow.asked["read by the host"] += 1
        return 0

    __int__ = _read
    __float__ = __bool__ = lambda self: float(self._read())

    def _computed(self, *_, **__):
        Hollow.asked["other"] += 1
        return Hollow(self.shape, self.dtype)

    copy = astype = __add__ = __mul__ = __rmul__ = _computed

    def __iadd__(self, other):
        self._computed()
        return self

    def __setitem__(self, key, value):
        self._computed()

    def sum(self, axis=None):
        Hollow.asked["other"] += 1
        gone = range(self.ndim) if axis is None else np.atleast_1d(axis) % self.ndim
        return Hollow([n for i, n in enumerate(self.shape) if i not in gone], self.dtype)


def library() -> ModuleType:
    """CuPy's functions that a step calls, of hollow arrays."""
    made = ModuleType("cupy")
    made.ndarray = Hollow

    def asarray(a, dtype=None):
        return a if isinstance(a, Hollow) else Hollow(np.shape(a), dtype or np.asarray(a).dtype)

    def filled(shape, dtype="float64"):
        Hollow.asked["other"] += 1
        return Hollow(shape, dtype)

    for name, function in {
            "empty": lambda shape, dtype="float64": Hollow(shape, dtype), "zeros": filled,
            "empty_like": lambda a: Hollow(a.shape, a.dtype), "asarray": asarray,
            "zeros_like": lambda a: filled(a.shape, a.dtype),
            "ones_like": lambda a: filled(a.shape, a.dtype),
            "array": lambda a, dtype=None, order=None: filled(a.shape, dtype or a.dtype),
            "ascontiguousarray": lambda a, dtype=None: a,
            "add": lambda a, b, out: a._computed()}.items():
        setattr(made, name, function)
    made.cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0),
                                get_current_stream=lambda: SimpleNamespace(ptr=0))
    return made


TERMS = LINE // 4  # of a turn in TF32


def fragments(kernel: str, grid: tuple[int, ...], g: np.void, constants: dict) -> tuple[int, int]:
    """(multiplied, without leaving anything out) of a problem of a launch of conv_mma."""
    positions, taps = (tuple(int(n) for n in g[name]) for name in ("positions", "taps"))
    turn = TERMS // 8 * ROWS // 16 * constants["COLUMNS"] // 8
    channels, batch = int(g["channels"]), int(g["batch"])
    inside = []
    for axis in range(3):
        at = (np.arange(positions[axis])[:, None] * g["stride"][axis]
              + np.arange(taps[axis]) * g["dilation"][axis] - g["before"][axis])
        inside.append((at >= 0) & (at < g["size"][axis]))
    count, rows = prod(taps), batch * prod(positions)
    if kernel == "correlate":
        chunks = -(-channels // TERMS) if constants["CHUNK"] == 4 else -(-channels * count // TERMS)
        whole = -(-rows // ROWS) * (count if constants["CHUNK"] == 4 else 1) * chunks
        done = whole
        if constants["CHUNK"] == 4:
            seen = np.einsum("di,hj,wk->dhwijk", *inside).reshape(-1, count)
            seen = np.concatenate([seen] * batch)  # of each row, then of each tile
            done = chunks * int(np.logical_or.reduceat(seen, np.arange(0, rows, ROWS)).sum())
        return turn * grid[1] * done, turn * grid[1] * whole
    done = 0
    for first in range(0, count * channels, ROWS):  # a tile of taps and channels: its box
        last = (min(first + ROWS, count * channels) - 1) // channels
        held = np.unravel_index(np.arange(first // channels, last + 1), taps)
        box = batch
        for axis in range(3):
            reached = np.flatnonzero(inside[axis][:, held[axis]].any(axis=1))
            box *= int(np.ptp(reached)) + 1 if len(reached) else 0
        done += -(-box // TERMS)
    return turn * grid[1] * done, turn * grid[1] * grid[0] * -(-rows // TERMS)


def layer(kernel: str, problems: np.ndarray, swapped: bool) -> tuple[str, ...]:
    """What a launch computes, in words: which product, of what kernel and grid."""
    g = problems[0]
    backwards = swapped or g["channels"] == CLASSES  # of so few, the kernel is turned before
    what = "w" if kernel == "correlate_dw" else "x" if backwards else "y"
    taps, stride, dilation, positions = ("x".join(map(str, g[name])) for name in (
        "taps", "stride", "dilation", "positions" if what == "w" else "grid"))
    ends = [str(g["channels"]), str(g["filters"])]
    return (what, taps if len(problems) == 1 else f"{len(problems)} parts of a stride",
            " -> ".join(reversed(ends) if what == "x" else ends), stride, dilation, positions)


@contextmanager
def counted():
    """{kernel: launches} and {layer: [launches, fragments multiplied, all]} of what runs inside."""
    launches: Counter = Counter()
    layers: dict[tuple[str, ...], np.ndarray] = {}

    class Function:
        max_dynamic_shared_size_bytes = loader.SHARED_LIMIT

        def __init__(self, library, file, kernel, constants):
            self.file, self.kernel, self.constants = file, kernel, dict(constants)

        def __call__(self, grid, block, arguments, shared_mem=0):
            launches[f"{self.file}.{self.kernel}"] += 1
            if self.file == "conv_mma":
                problems = arguments[3].view(GEOMETRY)
                found = sum(np.array(fragments(self.kernel, grid, problem, self.constants))
                            for problem in problems)
                key = layer(self.kernel, problems, bool(self.constants.get("SWAPPED")))
                layers[key] = layers.get(key, 0) + np.array([1, *found])

    Hollow.asked.clear()
    with mock.patch.dict(sys.modules, cupy=library()), \
            mock.patch.object(loader, "_function", Function):
        yield launches, layers


def step(backbone: str, batch: int, size: tuple[int, ...], options: dict) -> None:
    """Forward, Dice + cross-entropy, backward, SGD."""
    hollow = sys.modules["cupy"]
    net = ts.models.resnet_seg(backbone, rank=3, in_channels=1, classes=CLASSES,
                                **options)
    optimizer = ts.optim.SGD(ts.to_device(net, hollow).parameters(), 1e-3, momentum=0.9)
    Hollow.asked.clear()
    logits = net(Hollow((batch, *size, 1)))
    losses.dice_cross_entropy(logits, Hollow((batch, *size), "uint8")).backward()
    optimizer.step()


def table() -> str:
    """All counts, in Markdown."""
    parts = []
    lines = ["| a training step | launches | in bf16 | of others | reads by the host | fragments | "
             "of all |", "|---|---|---|---|---|---|---|"]
    for case, (batch, size, options) in CASES.items():
        for backbone in "resnet18", "resnet50":
            with counted() as (in_bf16, _), ts.cuda.precision("bf16"):
                step(backbone, batch, size, options)
            with counted() as (launches, layers):
                step(backbone, batch, size, options)
            _, done, whole = sum(layers.values())
            lines.append(f"| {backbone}, {case} | {sum(launches.values())} | "
                         f"{sum(in_bf16.values())} | {Hollow.asked['other']} | "
                         f"{Hollow.asked['read by the host']} | "
                         f"{done / 1e6:.1f} million | {done / whole:.2f} |")
            if not options:
                parts += ["", f"{backbone}, {case}, by layer: of the output y, or of the gradient"
                          " in x or w", "", "| of | kernel | channels | stride | dilation | grid |"
                          " launches | thousand fragments | of all |", "|---" * 9 + "|"]
                parts += [f"| {' | '.join(key)} | {n} | {done / 1e3:.1f} | {done / whole:.2f} |"
                          for key, (n, done, whole) in layers.items()]
    return "\n".join(lines + parts) + "\n"


def keep(table: Callable[[], str], name: str, description: str | None,
         arguments: list[str] | None = None, missing: str = "") -> int:
    """Print a table and keep it, by default under this name in benchmarks/results/gpu; `missing`
    says what it cannot be made without."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu" / name,
                        metavar="FILE", help="%(default)s")
    args = parser.parse_args(arguments)
    if missing:
        parser.error(missing)
    text = table()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, "utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(keep(table, "counts.md", __doc__))

"""Convolution kernels, emulated, through the code that launches them on a GPU.

The specification is `windows.reference` in float64. The tensor-core kernels are given to it with
both factors rounded to TF32, so that they too must agree to float32's rounding and not merely to
TF32's: a dropped term of a long sum would hide there.
"""

import re
from contextvars import copy_context
from unittest import mock

import emulator
import numpy as np
import pytest
from convolutions import arrays, placed
from emulator import mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import windows
from tinyseg.cuda import PRECISIONS, precision, precision_here, source
from tinyseg.windows import Window, kernels, products, reference

FEW = settings(max_examples=25, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])


def tf32(x):
    """A number with ten bits of mantissa beside each: made larger by 3 * 2^-13, then cut off."""
    return ((x * np.float32(1 + 3 * 2.0**-13)).view("uint32") & 0xFFFFE000).view("float32")


def bf16(x):
    """The nearest number with seven bits of mantissa beside the first, of two the even one."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**8) / np.float32(2**8), exponent).astype("float32")


ROUNDED = {"fp32": lambda a: a, "tf32": tf32, "bf16": bf16}


def error(ours, truth):
    """The largest difference, in units of the largest true number."""
    assert ours.shape == truth.shape and ours.dtype == "float32"
    return np.abs(ours - truth).max() / max(np.abs(truth).max(), 1e-30)


def check(cuda, x, w, window, seed=0, *, multiplied="fp32", tolerance=3e-6):
    """All three readings of one convolution against the specification, its factors rounded."""
    (channels, filters), size = w.shape[-2:], x.shape[1:-1]

    def rounded(results, taps, *factors):
        """As the tensor cores take them: results in fours; bfloat16 for channels in eights and
        several taps."""
        name = "fp32" if results % 4 else multiplied
        if name == "bf16" and (channels % 8 or filters % 8 or not 1 < taps <= 32):
            name = "tf32"
        return [ROUNDED[name](a).astype("float64") for a in factors]

    taps, most = np.prod(window.kernel), 1  # of a residue of the stride, which dx sees apart
    for axis in zip(size, window.kernel, window.stride, window.dilation, window.padding,
                    window.edge, strict=True):
        n, k, stride, dilation, (before, after), edge = axis
        grid, before = (n + before + after, 0) if edge else (n, before)
        most *= max(len(range(k)[some]) if some else 0 for _, some, _, _ in products.phases(
            grid, k, stride, dilation, before))
    y = reference.correlate(*rounded(filters, taps, x, w), window)
    g = np.random.default_rng(seed).standard_normal(y.shape).astype("float32")
    there = [cuda.asarray(a) for a in (x, w, g)]
    with precision(multiplied):
        ours = (windows.correlate(there[0], there[1], window),
                windows.correlate_dx(there[2], there[1], size, window),
                windows.correlate_dw(there[0], there[2], window))
    truth = (y, reference.correlate_dx(*rounded(channels, most, g, w), size, window),
             reference.correlate_dw(*rounded(filters, taps, x, g), window))
    for name, a, b in zip(("y", "dx", "dw"), ours, truth, strict=True):
        assert error(a.get(), b) < tolerance, name


@st.composite
def problems(draw, factor):
    """Channels and filters are multiples of `factor`."""
    size, window = draw(placed(rank=3, size=8, dilation=3, padding=4))
    channels, filters = (factor * draw(st.integers(1, 6)) for _ in range(2))
    return size, draw(st.integers(1, 2)), channels, filters, window


@pytest.mark.parametrize("order", emulator.ORDERS)
@FEW
@given(problems(1), st.integers(0, 99))
def test_in_float32(cuda, monkeypatch, order, problem, seed):
    size, batch, channels, filters, window = problem
    monkeypatch.setattr(emulator, "order", order)
    check(cuda, *arrays(size, batch, channels, filters, window.kernel, seed), window, seed)


@pytest.mark.parametrize("order", emulator.ORDERS)
@FEW
@given(problems(8), st.sampled_from(["tf32", "bf16"]), st.integers(0, 99))
def test_on_tensor_cores(cuda, monkeypatch, order, problem, multiplied, seed):
    size, batch, channels, filters, window = problem
    monkeypatch.setattr(emulator, "order", order)
    check(cuda, *arrays(size, batch, channels, filters, window.kernel, seed), window, seed,
          multiplied=multiplied)


@pytest.mark.parametrize("multiplied", PRECISIONS)
@pytest.mark.parametrize("size, channels, filters, kernel, options", [
    ((3, 5, 6), 72, 136, (3, 3, 3), {"padding": 2, "dilation": 2}),  # two tiles of filters
    ((1, 24, 25), 8, 40, (1, 3, 3), {"padding": (0, 1, 1)}),  # three slices of positions
    ((4, 9, 7), 40, 8, (1, 1, 1), {"stride": 2}),  # inputs that no tap reaches
    ((6, 7, 5), 8, 16, (2, 3, 3), {"padding": ((1, 0), 4, 4), "dilation": (1, 4, 4),
                                   "padding_mode": ("edge", "zero", "zero")}),
    ((17, 15), 3, 64, (7, 7), {"stride": 2, "padding": 3}),  # stems: number by number
    ((5, 12, 9), 1, 68, (3, 7, 7), {"stride": (1, 2, 2), "padding": (1, 3, 3)}),
    ((9, 11, 7), 72, 40, (3, 3, 3), {"stride": 2, "padding": 1}),  # eight residues, of odd sizes
    ((7, 8, 10), 8, 16, (3, 4, 5), {"stride": (3, 2, 4), "padding": 2, "dilation": (1, 3, 1)}),
    ((5, 6, 7), 8, 16, (4, 4, 4), {"stride": 4, "padding": 1}),  # 64: more than a launch has
])
def test_the_shapes_of_networks(cuda, multiplied, size, channels, filters, kernel, options):
    x, w = arrays(size, 2, channels, filters, kernel, 1)
    check(cuda, x, w, Window.of(kernel, **options), multiplied=multiplied)


@pytest.mark.parametrize("multiplied", ["tf32", "bf16"])
@pytest.mark.parametrize("channels, filters", [(72, 136), (136, 40)])
def test_lanes_that_read_together_find_different_banks(cuda, multiplied, channels, filters):
    emulator.statistics.clear()
    check(cuda, *arrays((3, 9, 8), 1, channels, filters, (3, 3, 3), 1), Window.of((3, 3, 3), 1, 1),
          multiplied=multiplied)
    for name in ("correlate", "correlate_dw")[: 1 + (multiplied == "bf16")]:  # TF32's dw has none
        assert emulator.statistics[name]["matrices"] > 0 == emulator.statistics[name]["conflicts"]


# Infinities and NaNs in all their bits: the GPU's own, with either sign; quiet and signalling
# ones of few bits; of the low thirteen alone, which the tensor cores do not see.
NOT_FINITE = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7F801000,
              0x7FFFF000, 0x7F800000, 0xFF800000]


@pytest.mark.parametrize("bits", NOT_FINITE, ids=hex)
@pytest.mark.parametrize("multiplied", PRECISIONS)
def test_what_is_not_finite_stays_so(cuda, multiplied, bits):
    """One number of x, of w or of y: every number that it takes part in is NaN, or infinite."""
    value, window = np.array([bits], "uint32").view("float32")[0], Window.of((3, 3), 1, 1)
    wrong = np.isnan if np.isnan(value) else np.isinf
    x, w = (abs(a) + 1 for a in arrays((5, 6), 1, 8, 16, (3, 3), 3))
    g = np.ones((1, 5, 6, 16), "float32")
    readings = [
        (x, (0, 2, 3, 4), lambda a: windows.correlate(a, cuda.asarray(w), window),
         (0, slice(1, 4), slice(2, 5))),
        (w, (1, 1, 4, 9), lambda a: windows.correlate(cuda.asarray(x), a, window), (..., 9)),
        (w, (1, 1, 4, 9), lambda a: windows.correlate_dx(cuda.asarray(g), a, (5, 6), window),
         (..., 4)),
        (g, (0, 2, 3, 9), lambda a: windows.correlate_dx(a, cuda.asarray(w), (5, 6), window),
         (0, slice(1, 4), slice(2, 5))),
        (x, (0, 2, 3, 4), lambda a: windows.correlate_dw(a, cuda.asarray(g), window),
         (slice(None), slice(None), 4)),
        (g, (0, 2, 3, 9), lambda a: windows.correlate_dw(cuda.asarray(x), a, window), (..., 9)),
    ]
    for array, at, read, touched in readings:
        changed = array.copy()
        changed.view("uint32")[at] = bits
        with precision(multiplied):
            y = read(cuda.asarray(changed)).get()
        assert wrong(y[touched]).all(), at
        y[touched] = 0
        assert np.isfinite(y).all()


def through_tensor_cores(cuda, x):
    """x, a multiple of eight numbers, times one; a second tap sees the padding only."""
    w = np.stack(2 * [np.eye(8, dtype="float32")])[:, None]
    y = windows.correlate(cuda.asarray(x.reshape(1, 1, -1, 8)), cuda.asarray(w),
                          Window.of((2, 1), 1, ((0, 1), 0)))
    return y.get().reshape(x.shape)


def test_how_numbers_become_those_of_tensor_cores(cuda):
    """Those of ten bits of mantissa stay; the others move by less than 3/4 of a step, either way
    alike: on average over all mantissas, as products have them, by nothing."""
    rng = np.random.default_rng(5)
    x = (2 ** rng.uniform(-3, 3, 1 << 14) * rng.choice([-1, 1], 1 << 14)).astype("float32")
    kept = through_tensor_cores(cuda, x)
    assert (kept.view("uint32") & 0x1FFF == 0).all() and (kept == tf32(x)).all()
    assert (through_tensor_cores(cuda, kept) == kept).all()
    step = 2.0 ** (np.floor(np.log2(abs(x))) - 10)
    assert (abs(kept - x.astype("float64")) < 0.75 * step).all()
    off = kept / x.astype("float64") - 1
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(off.size) + 2e-5 < 4e-5
    cut = (x.view("uint32") & 0xFFFFE000).view("float32") / x.astype("float64") - 1
    assert cut.mean() < -3e-4


def test_how_numbers_become_bfloat16(cuda):
    """The nearest ones, of two the even one; a number of seven bits of mantissa stays."""
    rng = np.random.default_rng(6)
    x = (2 ** rng.uniform(-3, 3, 1 << 12) * rng.choice([-1, 1], 1 << 12)).astype("float32")
    x[:256:2] = (1 + np.arange(128) / 128 + 1 / 256).astype("float32")  # half a step away from two
    with precision("bf16"):
        kept = through_tensor_cores(cuda, x)
        assert (kept == bf16(x)).all() and (through_tensor_cores(cuda, kept) == kept).all()
        assert (kept.view("uint32") & 0xFFFF == 0).all() and (kept[:256:2] != x[:256:2]).all()
        bits = np.array([0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF], "uint32")
        most = np.float32(2 - 2.0**-7) * np.float32(2.0**127)
        ends = through_tensor_cores(cuda, np.diag(np.resize(bits, 8)).view("float32"))
        assert (ends.diagonal()[:4] == [most, most, np.inf, -np.inf]).all()


def test_a_precision_has_a_name():
    """It ends with its context, and there are three."""
    with precision("bf16"), precision("fp32"):
        assert precision_here() == "fp32"
    assert precision_here() == "tf32"

    def inside(name):
        with precision(name):
            yield

    first, second, third = map(inside, ("bf16", "fp32", "bf16"))
    assert [next(first), precision_here(), next(second), precision_here()] == [
        None, "bf16", None, "fp32"]
    first.close()
    assert precision_here() == "fp32"
    second.close()
    copy_context().run(next, third)
    third.close()
    assert precision_here() == "tf32"
    with pytest.raises(ValueError, match="found precision 'half'; expected one of fp32, tf32"):
        with precision("half"):
            raise AssertionError


def test_the_largest_numbers(cuda):
    """The largest number of TF32 is (2 - 2^-10) 2^127; a little more is infinite."""
    bits = np.array([0x7F7FE000, 0x7F7FE7FF, 0x7F7FE900, 0x7F7FFFFF, 0xFF7FE000, 0xFF7FFFFF,
                     0x00000FFF, 0], "uint32")
    largest = np.float32(2 - 2.0**-10) * np.float32(2.0**127)
    assert (through_tensor_cores(cuda, np.diag(bits).astype("uint32").view("float32")).diagonal()
            == [largest, largest, np.inf, np.inf, -largest, -np.inf, 0, 0]).all()


def test_every_order_gives_the_same_bits(cuda, monkeypatch):
    x, w = (cuda.asarray(a) for a in arrays((4, 9, 11), 2, 16, 24, (3, 3, 3), 2))
    window = Window.of((3, 3, 3), 1, 1)
    results = set()
    for order in emulator.ORDERS:
        monkeypatch.setattr(emulator, "order", order)
        y = windows.correlate(x, w, window)
        results.add((y.get().tobytes(), windows.correlate_dw(x, y, window).get().tobytes(),
                     windows.correlate_dx(y, w, (4, 9, 11), window).get().tobytes()))
    assert len(results) == 1


@FEW
@given(problems(1), st.integers(0, 99))
def test_columns(cuda, problem, seed):
    """Explicit im2col times the kernel is the convolution, and fold is the adjoint of unfold."""
    size, batch, channels, filters, window = problem
    x, w = arrays(size, batch, channels, filters, window.kernel, seed)
    columns = kernels.unfold(cuda.asarray(x), window).get()
    y = reference.correlate(x.astype("float64"), w.astype("float64"), window)
    assert error((columns.reshape(-1, w[..., 0].size) @ w.reshape(-1, filters)).reshape(y.shape),
                 y) < 3e-6
    g = np.random.default_rng(seed).standard_normal(columns.shape).astype("float32")
    folded = kernels.fold(cuda.asarray(g), size, window).get()
    left, right = (columns.astype("float64") * g).sum(), (x.astype("float64") * folded).sum()
    assert abs(left - right) < 1e-5 * (np.abs(columns * g).sum() + 1)


@given(size=st.integers(1, 12), kernel=st.integers(1, 5), stride=st.integers(1, 4),
       dilation=st.integers(1, 5), before=st.integers(0, 9))
def test_phases_hold_every_pair_of_tap_and_output_once(size, kernel, stride, dilation, before):
    """(input, tap, output) of the definition are those of the phases."""
    truth = {(p * stride + k * dilation - before, k, p) for p in range(-50, 50)
             for k in range(kernel) if 0 <= p * stride + k * dilation - before < size}
    found = []
    for start, taps, step, padding in products.phases(size, kernel, stride, dilation, before):
        if taps is not None:
            (count,) = products.count((size,), (start,), (stride,))
            found += [(start + i * stride, k, i - padding + j * step) for i in range(count)
                      for j, k in enumerate(range(kernel)[taps])]
    assert len(found) == len(set(found)) and set(found) == truth


def test_geometry_is_the_struct_of_the_source():
    struct = re.search(r"struct Geometry \{(.*?)\};", source("conv_simt"), re.S)[1]
    fields = re.findall(r"(\w+)(\[3\])?[,;]", re.sub(r"//.*", "", struct))
    assert [name for name, _ in fields] == list(kernels.GEOMETRY.names)
    assert all((kernels.GEOMETRY[name].shape == (3,)) == bool(axes) for name, axes in fields)
    assert kernels.GEOMETRY.itemsize == 4 * (5 + 3 * 10)


def test_what_the_kernels_do_not_count_is_refused():
    with pytest.raises(ValueError, match="smaller batch or patch"):
        kernels._geometry((((2, 2**10, 2**10, 2**10, 8), 8, (1, 1, 1), (1, 1, 1), 1, 1, 0),))
    with pytest.raises(ValueError, match="output"):
        kernels._geometry((((2, 8, 8, 8, 8), 8, (1, 1, 1), (1, 1, 1), 1, 1, 0, (2**10,) * 3),))


def test_who_computes_what(cuda, monkeypatch):
    """Float32 on the GPU up to rank three goes to the kernels; all else to the reference."""
    launched = []
    monkeypatch.setattr(kernels.cuda, "launch", lambda *a, **k: launched.append((a[0], a[1])))

    def conv(rank, channels, filters, dtype="float32", where=cuda, k=1):
        x, w = arrays((3,) * rank, 1, channels, filters, (k,) * rank, 0)
        windows.correlate(*(where.asarray(a.astype(dtype)) for a in (x, w)), Window.of((k,) * rank))
        return launched.pop()[0] if launched else "reference"

    assert conv(3, 8, 8) == conv(2, 8, 16, k=3) == conv(1, 64, 8) == conv(3, 1, 4) == "conv_mma"
    assert conv(3, 8, 3) == conv(3, 4, 1) == "conv_simt"
    assert conv(4, 8, 8) == conv(3, 8, 8, "float64") == conv(3, 8, 8, where=np) == "reference"
    with precision("fp32"):
        assert conv(3, 8, 8) == "conv_simt"
    assert conv(3, 8, 8) == "conv_mma"


def test_unaligned_and_strided_arrays(cuda):
    """What is not contiguous, or starts where 16-byte loads cannot, is copied first."""
    rng = np.random.default_rng(3)
    flat = rng.standard_normal(1 + 2 * 5 * 6 * 8).astype("float32")
    there = cuda.asarray(flat)
    window, w = Window.of((3, 3), padding=1), rng.standard_normal((3, 3, 8, 8), "float32")
    x = flat[1:].reshape(2, 5, 6, 8)
    for ours, truth in ((there[1:].reshape(2, 5, 6, 8), x),
                        (there[1:].reshape(2, 6, 5, 8).swapaxes(1, 2),
                         flat[1:].reshape(2, 6, 5, 8).swapaxes(1, 2))):
        with precision("fp32"):
            y = windows.correlate(ours, cuda.asarray(w), window)
        assert error(y.get(), reference.correlate(truth.astype("float64"), w, window)) < 3e-6


@pytest.mark.parametrize("multiplied", PRECISIONS)
def test_kernels_that_lie_anywhere(cuda, multiplied):
    """Not where 16-byte loads start, as a part of more filters, in another order of axes, or with
    taps that do not start there."""
    x, w = arrays((5, 6), 2, 8, 16, (3, 3), 7)
    window = Window.of((3, 3), 1, 1)
    flat = cuda.asarray(np.concatenate([[0], w.ravel()]).astype("float32"))[1:].reshape(w.shape)
    wide = cuda.asarray(np.concatenate([w, w], axis=-1))[..., :16]
    turned = cuda.asarray(np.ascontiguousarray(w.transpose(3, 1, 0, 2))).transpose(2, 1, 3, 0)
    apart = cuda.asarray(np.pad(w.reshape(9, -1), [(0, 0), (0, 1)]))[:, :-1].reshape(w.shape)
    x, g = cuda.asarray(x), cuda.asarray(np.ones((2, 5, 6, 16), "float32"))

    def both(w):
        return [a.get() for a in (windows.correlate(x, w, window),
                                  windows.correlate_dx(g, w, (5, 6), window))]

    with precision(multiplied):
        right = both(cuda.asarray(w))
        for lying in flat, wide, turned, apart:
            for ours, truth in zip(both(lying), right, strict=True):
                assert error(ours, truth) < 1e-6


@pytest.mark.parametrize("added, relu", [(False, False), (True, False), (False, True),
                                         (True, True)])
def test_an_operation_on_tensors(cuda, added, relu):
    """ops.conv on the stand-in, with all that may follow it, equals it on NumPy."""
    x, w = arrays((5, 6), 2, 8, 16, (3, 3), 4)
    b, results = np.arange(-8, 8, dtype="float32"), []
    r = np.random.default_rng(5).standard_normal((2, 3, 3, 16)).astype("float32")
    for library in (np, cuda):
        leaves = [ts.Tensor(library.asarray(a), requires_grad=True)
                  for a in (x, w, b, *[r] * added)]
        with precision("fp32"):
            y = ts.ops.conv(*leaves, relu=relu, padding=1, stride=2)
            (y * y).sum().backward()
        results.append([ts.to_numpy(a) for a in (y.data, *(leaf.grad for leaf in leaves))])
    for ours, theirs in zip(*results, strict=True):
        assert error(theirs, ours) < 3e-6


# Planted bugs: each is found as a fault or as a wrong number, in one of the orders.

SYNC = "    __syncthreads();\n"
BUGS = [
    ("conv_simt", "if (more) store(buffer ^ 1);\n" + SYNC, "if (more) store(buffer ^ 1);\n"),
    ("conv_simt", "term < terms && inside(at, g)", "term < terms"),
    ("conv_simt", "row < terms && column < g.filters", "row < terms"),
    ("conv_simt", "if (row + i >= count) break;", ""),
    ("conv_simt", "if (column + j < g.filters) out", "out"),
    ("conv_simt", "term < end && column < g.filters", "column < g.filters"),
    ("conv_simt", "locate(term + 2 * DEPTH, buffer)", "locate(term + 2 * DEPTH, buffer ^ 1)"),
    ("conv_simt", "(unsigned)p.h < (unsigned)g.size[1] &&", ""),
    ("conv_mma", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();"),
    ("conv_mma", SYNC[:-1] + " " * 41 + "// this", "    // this"),
    ("conv_mma", "fill(turn + STAGES - 1)", "fill(turn)"),
    ("conv_mma", "channel < g.channels ? 1u << next_tap : 0", "1u << next_tap"),
    ("conv_mma", "valid[i] & bit", "true"),
    ("conv_mma", "left = live, next", "left = ~0u, next"),
    ("conv_mma", "skipped; --skipped", "0; --skipped"),
    ("conv_mma", "(slices == 1 ? outputs[i]", "(true ? outputs[i]"),
    ("conv_mma", "outputs[r] = written(p, g)", "outputs[r] = first_row + r"),
    ("conv_mma", "term < count_here && first_column + column < g.filters",
     "first_column + column < g.filters"),
    ("conv_mma", "term < count_here && first_column + column < g.filters", "term < count_here"),
    ("conv_mma", "order & 7", "order & 7 & threadIdx.x"),
    ("conv_mma", "shift[next_tap] +", "0 +"),
    ("conv_mma", "lane < count_here && inside(corners[row] + step, g)", "lane < count_here"),
    ("conv_mma", "next_term += TERMS", "next_term += 8"),
    ("conv_mma", "inside(corners[slot][first + term] + way, g)", "true"),
    ("conv_mma", "at.d = -(1 << 30)", "at.d += 0"),
    ("conv_mma", "(turn + 1) % ROUND == 0", "turn % ROUND == 0"),
    ("conv_mma", "const int slot = turn / ROUND & 1", "const int slot = 0"),
    ("conv_mma", "term < end ? seen(at, g) : 0", "seen(at, g)"),
    ("conv_mma", "masks[slot][first + term] & bit", "masks[slot][first + term]"),
    ("conv_mma", "b_column < g.filters);", "true);"),
    ("conv_mma", "end = max(end, min(", "end = min(end + 1, min("),
    ("conv_mma", "begin = min(begin, max(0, ", "begin = min(begin, max(1, "),
    ("conv_mma", "a[i][2 * half] = tf32(v.x), a[i][2 * half + 1] = tf32(v.y)",
     "a[i][2 * half] = tf32(v.y), a[i][2 * half + 1] = tf32(v.x)"),
    ("conv_mma", "= factor(left[i][e])", "= left[i][e]"),
    ("conv_mma", "(term + lane % 16) * B_PITCH", "(term + lane % 8) * B_PITCH"),
    ("conv_mma", "spread(j + lane / 16, 0)", "spread(j, 0)"),
    ("conv_mma", "(term + lane / 16 * 8 + lane % 8) * A_PITCH", "(term + lane % 16) * A_PITCH"),
    ("conv_mma", "spread(2 * i + lane / 8 % 2, 0)", "spread(2 * i, 0)"),
    ("conv_mma", "make_float2(sum[q / 2][j][e], ", "make_float2(sum[q / 2][j][0], "),
    ("conv_mma", "APART (BF16 ? 1 : 4)", "APART 4"),
    ("conv_mma", "term += DEPTH", "term += 8"),
    ("round", "bf16(low.x, low.y)", "bf16(low.y, low.x)"),
    ("round", "if (at >= count) return;", ""),
    ("round", "from + at + 4", "from + at"),
    ("conv_mma", "v * (1 + 3 / 8192.f)", "v"),
    ("conv_simt", "w + g.origin +", "w +"),
    ("conv_mma", "shift[t] = g.origin +", "shift[t] ="),
    ("conv_mma", "w + (g.origin +", "w + ("),
    ("conv_mma", "slice = blockIdx.z - problem * slices", "slice = problem"),
    ("conv_mma", "(slice + 1) / slices", "slice / slices + 1"),
    ("slices", "s * numbers", "(s - 1) * numbers"),
    ("slices", "if (at >= (long long)rows(g) * g.filters) return;", ""),
    ("slices", "blockIdx.y * count", "blockIdx.y"),
    ("unfold", "from % stride == 0 &&", ""),
    ("unfold", "&& from / stride < positions", ""),
]


def every_body(cuda):
    """Few convolutions that together reach every line of the sources."""
    window = Window.of((3, 3, 3), 1, 1)
    for channels, filters in ((40, 24), (8, 72)):
        problem = arrays((5, 9, 7), 1, channels, filters, (3, 3, 3), 5)
        check(cuda, *problem, window)
        check(cuda, *problem, window, multiplied="tf32")
        check(cuda, *problem, window, multiplied="bf16")
    with mock.patch.object(kernels, "_slices", lambda *_: 1):  # and taps that no tile sees
        check(cuda, *arrays((1, 9, 7), 1, 40, 24, (3, 3, 3), 5), window, multiplied="tf32")
        check(cuda, *arrays((5, 9, 7), 1, 3, 8, (3, 3, 3), 5), window, multiplied="tf32")
    two = Window.of((3, 3, 3), 2, 1)  # the residues of a stride in a launch
    for filters, slices in ((24, 1), (24, 2), (6, 1)):
        with mock.patch.object(kernels, "_slices", lambda *_, n=slices: n):
            check(cuda, *arrays((9, 7, 5), 1, 8, filters, (3, 3, 3), 5), two, multiplied="tf32")
    for name in "fp32", "bf16":
        check(cuda, *arrays((9, 7, 5), 1, 72, 24, (3, 3, 3), 5), two, multiplied=name)
    window = Window.of((3, 2), 2, 1)
    x, _ = arrays((6, 7), 1, 5, 3, (3, 2), 6)
    columns = kernels.unfold(cuda.asarray(x), window)
    expected = reference.correlate_dx(columns.get().reshape(1, 3, 4, -1).astype("float64"),
                                      np.eye(30).reshape(3, 2, 5, 30), (6, 7), window)
    assert error(kernels.fold(columns, (6, 7), window).get(), expected) < 1e-6


def test_no_bug_is_planted(cuda):
    every_body(cuda)


@pytest.mark.parametrize("file, sound, broken", BUGS)
def test_planted_bugs_are_found(cuda, monkeypatch, file, sound, broken):
    found = []
    with mutated(file, sound, broken):
        for order in emulator.ORDERS:
            monkeypatch.setattr(emulator, "order", order)
            try:
                every_body(cuda)
            except (AssertionError, emulator.Fault) as error:
                found.append(error)
    assert found

"""The kernels of interpolation, losses and optimisers against what NumPy computes in float64."""

from functools import partial
from itertools import product

import emulator
import numpy as np
import pytest
from emulator import mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyseg import Tensor, losses, nn, ops, optim, train
from tinyseg.cuda import loss as loss_kernels
from tinyseg.cuda import optim as optim_kernels
from tinyseg.cuda.loss import segmentation
from tinyseg.cuda.upsample import coordinates, upsample, upsample_adjoint

ORDERS = st.sampled_from(emulator.ORDERS)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


def few(n):
    return settings(max_examples=n, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# Interpolation


def along(x, axis, matrix):
    return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def check_upsample(cuda, x, size, align_corners, plain=True):
    """Both kernels against the matrices of each axis and against each other."""
    before = x.shape[1:-1]
    expected, g = x.astype(float), normal(len(x), *size, x.shape[-1], seed=2)
    back = g.astype(float)
    for axis, (n, m) in enumerate(zip(before, size, strict=True), start=1):
        matrix = ops.interpolation(n, m, align_corners)
        expected, back = along(expected, axis, matrix), along(back, axis, matrix.T)
    ours, theirs = cuda.asarray(x), cuda.asarray(g)
    if not plain:  # the same numbers, not contiguous
        ours, theirs = (cuda.ascontiguousarray(a.T).T for a in (ours, theirs))
    y = upsample(ours, size, align_corners).get()
    dx = upsample_adjoint(theirs, before, align_corners).get()
    close(y, expected)
    close(dx, back)
    assert y.dtype == dx.dtype == "float32" and dx.shape == x.shape
    products = y * g.astype(float)
    assert products.sum() == pytest.approx((x * dx.astype(float)).sum(),
                                           abs=1e-6 * abs(products).sum())


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9) | st.none()), min_size=1,
                max_size=3), st.integers(1, 2), st.sampled_from([1, 3, 4]), st.booleans(),
       st.booleans(), ORDERS)
@few(60)
def test_upsample(cuda, monkeypatch, axes, batch, channels, align_corners, plain, order):
    monkeypatch.setattr(emulator, "order", order)
    x = normal(batch, *(n for n, _ in axes), channels)
    check_upsample(cuda, x, tuple(m or n for n, m in axes), align_corners, plain)


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsample_of_many_numbers_in_a_row(cuda, align_corners):
    check_upsample(cuda, normal(2, 3, 5, 7), (4, 400), align_corners)  # rows of 2800 numbers


def test_upsample_reads_no_neighbour_of_weight_zero(cuda, monkeypatch):
    for flush in ("start", "end"):  # the array touches its front, or its back guard
        monkeypatch.setattr(emulator, "flush", flush)
        for size in [(2, 6, 4), (4, 3, 4), (2, 3, 8), (1, 1, 1), (5, 6, 7)]:
            check_upsample(cuda, normal(1, 2, 3, 4, 4), size, True)


def test_upsample_to_the_same_size_is_the_same_array(cuda):
    x = cuda.asarray(normal(2, 3, 4, 5))
    assert upsample(x, (3, 4), False) is x and upsample_adjoint(x, (3, 4), False) is x
    close(upsample(x, (3, 8), True).get()[:, :, [0, -1]], x.get()[:, :, [0, -1]], rtol=0, atol=0)


def test_coordinates_are_those_of_the_matrix():
    for n, m, align_corners in product(range(1, 7), range(1, 20), [False, True]):
        low, fraction = coordinates(n, m, align_corners)
        x = np.append(normal(n).astype(float), np.nan)  # no one may need a sample past the last
        y = x[low] * (1 - fraction) + np.where(fraction > 0, x[low + 1], 0) * fraction
        close(y, ops.interpolation(n, m, align_corners) @ x[:-1], rtol=1e-12)
        assert (np.diff(low) >= 0).all() and (0 <= fraction).all() and (fraction < 1).all()


# The loss


def drawn(shape, classes, ignore=None, dtype="int64", seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape)
    if ignore is not None:
        labels[rng.random(shape) < 0.3] = ignore
    return 3 * normal(*shape, classes, seed=seed), labels.astype(dtype)


def check_loss(cuda, logits, labels, *, entropy=True, overlap=True, weight=None, **options):
    """Value and gradient against losses.py on NumPy, in double."""
    leaf = Tensor(logits.astype(float), requires_grad=True)
    dice = {n: options[n] for n in ("ignore", "smooth", "background") if n in options}
    both = {**dice, "weight": weight}
    if entropy and overlap:
        expected = losses.dice_cross_entropy(leaf, labels, **both)
    elif overlap:
        expected = losses.dice(leaf, labels, **dice)
    else:
        expected = losses.cross_entropy(leaf, labels, dice.get("ignore"), weight)
    g = np.float32(0.7)
    expected.backward(np.array(0.7))
    value, pull = segmentation(
        cuda.asarray(logits), cuda.asarray(labels), entropy=entropy, overlap=overlap,
        weight=None if weight is None else cuda.asarray(weight.astype("float32")), **options)
    dx = pull(cuda.asarray(g))
    assert value.shape == () and value.dtype == dx.dtype == "float32"
    close(value.get(), expected.data)
    close(dx.get(), leaf.grad, atol=1e-7)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([2, 3, 5]),
       st.sampled_from([None, -1, 255, 1]), st.sampled_from([(1, 0), (0, 1), (1, 1)]),
       st.booleans(), st.booleans(), st.sampled_from([1e-5, 1.0]),
       st.sampled_from(["uint8", "int16", "int32", "uint32", "int64", "uint64"]), ORDERS)
@few(60)
def test_loss(cuda, monkeypatch, shape, classes, ignore, terms, weighted, background, smooth,
              dtype, order):
    monkeypatch.setattr(emulator, "order", order)
    if ignore == -1 and dtype[0] == "u":
        ignore = None
    logits, labels = drawn(tuple(shape), classes, ignore, dtype)
    check_loss(cuda, logits, labels, entropy=bool(terms[0]), overlap=bool(terms[1]),
               ignore=ignore, weight=np.linspace(0.5, 3, classes) if weighted else None,
               smooth=smooth, background=background)


@pytest.mark.parametrize("blocks", [2, 40])
def test_loss_over_many_voxels(cuda, monkeypatch, blocks):
    """Several voxels per thread, and more blocks than a warp merges at once."""
    monkeypatch.setattr(loss_kernels, "BLOCKS", blocks)
    check_loss(cuda, *drawn((10, 31, 37), 3, 2, "uint8"), ignore=2, weight=np.array([1, 2, 3.0]))


@pytest.mark.parametrize("classes", [1, loss_kernels.MAX_CLASSES])
def test_loss_of_one_class_and_of_many(cuda, classes):
    check_loss(cuda, *drawn((3, 100), classes), background=True)


def test_loss_where_nothing_counts(cuda):
    logits, labels = drawn((2, 3), 3)
    check_loss(cuda, logits, np.full_like(labels, 7), ignore=7)


def test_loss_of_huge_logits(cuda):
    logits, labels = drawn((5, 4), 3)
    check_loss(cuda, logits * np.float32(1e4), labels)
    logits[:] = [1e30, -1e30, 0]
    check_loss(cuda, logits, np.zeros_like(labels))


@pytest.mark.parametrize("terms", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_loss_of_voxels_and_classes_that_do_not_count(cuda, value, terms):
    """Anything in ignored voxels, and minus infinity for a class that is no label."""
    logits, labels = drawn((4, 70), 5, 9)
    labels[labels == 3] = 1
    logits[labels == 9], logits[..., 3] = value, -np.inf
    logits[labels == 9, 0] = 1
    check = partial(check_loss, cuda, entropy=bool(terms[0]), overlap=bool(terms[1]))
    check(logits, labels, ignore=9)
    check(logits, labels, ignore=9, weight=np.array([1, 2, 0.5, 3, 1]), background=True)


def test_loss_of_logits_further_apart_than_the_largest_number(cuda):
    logits = np.array([[3e38, -3e38, 0], [0, 1, 2]], "float32")
    check_loss(cuda, logits, np.array([0, 2]))


def test_loss_of_a_label_that_weighs_nothing(cuda):
    logits, labels = drawn((3, 40), 3)
    logits[labels == 1, 1] = -np.inf
    check_loss(cuda, logits, labels, overlap=False, weight=np.array([1, 0, 2.0]))


def test_labels_may_change_before_backward(cuda):
    logits, labels = (cuda.asarray(a) for a in drawn((3, 40), 3, dtype="int32"))
    value, pull = segmentation(logits, labels, entropy=True, overlap=True)
    expected = pull(cuda.asarray(np.float32(1))).get()
    labels[:] = 0
    assert (pull(cuda.asarray(np.float32(1))).get() == expected).all()


@pytest.mark.parametrize("dtype, wrong", [
    ("int64", -1), ("int64", 3), ("int64", 2**32 + 1), ("int64", -(2**40)), ("int32", 2**31 - 1),
    ("int32", -(2**31)), ("uint8", 255), ("uint64", 2**64 - 1), ("uint32", 2**32 - 1)])
@pytest.mark.parametrize("ignore", [None, 9])
def test_labels_out_of_range_are_named(cuda, dtype, wrong, ignore):
    logits, labels = drawn((4, 5), 3, dtype=dtype)
    labels[0, 0] = labels[1, 1] if ignore is None else ignore
    labels[2, 1] = wrong
    for shape in [(4, 5), (20,)]:
        logits, labels = logits.reshape(*shape, 3), labels.reshape(shape)
        with pytest.raises(ValueError) as theirs:
            losses.cross_entropy(Tensor(logits), labels, ignore)
        with pytest.raises(ValueError) as ours:
            segmentation(cuda.asarray(logits), cuda.asarray(labels), entropy=True, ignore=ignore)
        assert str(ours.value) == str(theirs.value) and f" {wrong};" in str(ours.value)


# The optimisers


SHAPES = [(7,), (3, 5, 2), (1,), (40, 30), (101,), (64,)]


def check_optimizer(cuda, kind, steps=3, shapes=SHAPES, transposed=False, **options):
    """A few steps of all parameters at once against optim.py on NumPy, in double."""
    rng = np.random.default_rng(1)
    theirs = [Tensor(rng.standard_normal(s), requires_grad=True) for s in shapes]
    reference = kind(theirs, **options)
    parameters = [cuda.asarray(p.data.astype("float32")) for p in theirs]
    running = [[cuda.zeros_like(p) for p in parameters] for _ in kind.slots]
    for step in range(1, steps + 1):
        gradients = [rng.standard_normal(s).astype("float32") for s in shapes]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.astype(float)
        reference.step()
        ours = [cuda.asarray(g) for g in gradients]
        if transposed:
            ours = [cuda.ascontiguousarray(g.T).T for g in ours]
        if kind is optim.SGD:
            optim_kernels.sgd(parameters, ours, *running, **options)
        else:
            optim_kernels.adamw(parameters, ours, *running, lr=options["lr"],
                                betas=reference.betas, eps=reference.eps,
                                weight_decay=reference.weight_decay, step=step)
    arrays = [parameters, *running]
    expected = [[p.data for p in theirs], *(reference.running[n] for n in kind.slots)]
    for many, others in zip(arrays, expected, strict=True):
        for ours, other in zip(many, others, strict=True):
            np.testing.assert_allclose(ours.get(), other, rtol=1e-6,
                                       atol=1e-6 * max(1, abs(other).max()))


@pytest.fixture(params=[100, 16384])
def chunk(request, monkeypatch):
    monkeypatch.setattr(optim_kernels, "CHUNK", request.param)


@given(st.booleans(), st.sampled_from([0, 1e-2]), st.booleans(), ORDERS)
@few(8)
def test_sgd(cuda, monkeypatch, chunk, nesterov, weight_decay, transposed, order):
    monkeypatch.setattr(emulator, "order", order)
    for momentum in (0.9, 0)[: 1 if nesterov else 2]:
        check_optimizer(cuda, optim.SGD, lr=0.1, momentum=momentum, nesterov=nesterov,
                        weight_decay=weight_decay, transposed=transposed)


@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_adamw(cuda, chunk, weight_decay):
    check_optimizer(cuda, optim.AdamW, lr=1e-2, weight_decay=weight_decay)


def test_norm(cuda, chunk):
    gradients = [normal(*s, seed=i) for i, s in enumerate(SHAPES)]
    ours = [cuda.ascontiguousarray(cuda.asarray(g).T).T for g in gradients]
    norm = optim_kernels.norm(ours)
    assert norm.dtype == "float64" and norm.shape == ()
    expected = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients))
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    gradients[2][0] = np.inf
    assert float(optim_kernels.norm([cuda.asarray(g) for g in gradients])) == np.inf


def averages(cuda, shapes=SHAPES):
    """train.Average of a network on the GPU against the one in host memory."""
    class Net(nn.Module):
        def __init__(self):
            for i, shape in enumerate(shapes):
                setattr(self, f"w{i}", Tensor(normal(*shape, seed=i), requires_grad=True))

    nets = [Net(), nn.to_device(Net(), cuda)]
    means = [train.Average(net, 0.9) for net in nets]
    for step in range(4):
        for net, mean in zip(nets, means, strict=True):
            for p in net.parameters():
                p.data *= 1 + step
            mean.update()
    for name, a in means[0].arrays.items():
        np.testing.assert_allclose(means[1].arrays[name].get(), a, rtol=1e-5, atol=1e-6)


def test_average(cuda, chunk):
    averages(cuda)


def test_optimizers_refuse_what_the_kernel_would_overrun(cuda):
    p = cuda.asarray(normal(4, 3))
    step = partial(optim_kernels.sgd, lr=0.1, momentum=0, nesterov=False, weight_decay=0)
    wrong = [p[:3], p.T, p.astype("float64"), cuda.zeros((3, 4), "float32").T, p[:, :2]]
    for other in wrong:
        with pytest.raises(ValueError, match="expected contiguous float32 arrays of equal shape"):
            step([p], [p.copy()], [other])
        with pytest.raises(ValueError, match="expected contiguous"):
            step([other], [p.copy()], [p.copy()])
    with pytest.raises(ValueError):
        step([p], [p.copy()], [])


def test_empty_arrays_have_no_chunks(cuda):
    p = cuda.zeros((0, 3), "float32")
    optim_kernels.sgd([p], [p], [p], lr=1, momentum=0, nesterov=False, weight_decay=0)
    assert float(optim_kernels.norm([p])) == 0


def test_every_order_of_warps_gives_the_same_bits(cuda, monkeypatch):
    monkeypatch.setattr(optim_kernels, "CHUNK", 300)
    logits, labels = (cuda.asarray(a) for a in drawn((3, 700), 3))
    g, one = cuda.asarray(normal(1, 9, 7, 5, 3)), cuda.asarray(np.float32(1))
    results = []
    for order in emulator.ORDERS:
        monkeypatch.setattr(emulator, "order", order)
        value, pull = segmentation(logits, labels, entropy=True, overlap=True)
        arrays = (value, pull(one), upsample_adjoint(g, (2, 3, 4), False),
                  upsample(g, (11, 8, 9), False), optim_kernels.norm([g, logits]))
        results.append([a.get().tobytes() for a in arrays])
    assert results[0] == results[1] == results[2]


# The confusion of predictions and labels


def check_confusion(cuda, logits, labels):
    counts = loss_kernels.confusion(cuda.asarray(logits), cuda.asarray(labels)).get()
    classes = logits.shape[-1]
    expected = np.zeros((len(labels), classes, classes + 1), int)
    for n, *at in np.ndindex(labels.shape):
        label = labels[(n, *at)]
        expected[n, logits[(n, *at)].argmax(), label if 0 <= label < classes else classes] += 1
    assert (counts == expected).all() and counts.dtype == "int32"
    assert (train._confusion(logits, labels) == expected).all()


def few_logits(shape, classes, seed=1):
    """Many are equal, some are NaN or infinite."""
    rng = np.random.default_rng(seed)
    values = np.array([-np.inf, -1, 0, 1, 1, np.inf, np.nan], "float32")
    return values[rng.integers(0, 7, (*shape, classes))]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 40),
       st.sampled_from(["uint8", "int16", "int64", "uint64"]), ORDERS, st.integers(0, 99))
@few(40)
def test_confusion(cuda, monkeypatch, shape, classes, dtype, order, seed):
    monkeypatch.setattr(emulator, "order", order)
    labels = drawn(shape, classes + 1, 255 if dtype == "uint8" else 2**15 - 1, dtype, seed)[1]
    check_confusion(cuda, few_logits(shape, classes, seed), labels)


def test_confusion_of_more_classes_than_a_block_holds(cuda):
    """NumPy's way then; up to there it is a kernel's."""
    for classes in 135, 136:
        found = loss_kernels.confusion(cuda.zeros((1, 2, classes), "float32"),
                                       cuda.zeros((1, 2), "int64"))
        assert (found is None) == (classes == 136)


def confusions(cuda):
    check_confusion(cuda, few_logits((3, 700), 3), drawn((3, 700), 5)[1] - 1)


# Would these tests see an error?


def upsampling(cuda):
    check_upsample(cuda, normal(1, 2, 3, 5, 2), (4, 5, 9), False)


def training(cuda):
    labels = drawn((5, 120), 3, 1)
    check_loss(cuda, *labels, ignore=1, weight=np.array([1, 2, 3.0]))


sgd = partial(check_optimizer, kind=optim.SGD, lr=0.1, momentum=0.9, nesterov=True,
              weight_decay=0.1, shapes=[(300,), (7,)])
adamw = partial(check_optimizer, kind=optim.AdamW, lr=0.1, shapes=[(300,), (7,)])


@pytest.mark.parametrize("file, old, new, check", [
    ("upsample", "deeper && fd > 0", "deeper", upsampling),
    ("upsample", "(f > 0 ? channels : 0)", "channels", upsampling),
    ("upsample", "i < (unsigned)row", "i <= (unsigned)row", upsampling),
    ("upsample", "if (i >= size) return;", "", upsampling),
    ("upsample", "m < start[j + 2]", "m + 1 < start[j + 2]", upsampling),
    ("loss", "top = fmaxf(top, p[c])", "top = 0", test_loss_of_huge_logits),
    ("loss", "  __syncthreads();\n  if (threadIdx.x >= SUMS)", "  if (threadIdx.x >= SUMS)",
     training),
    ("loss", "  __syncthreads();\n  if (threadIdx.x > 0)", "  if (threadIdx.x > 0)", training),
    ("loss", "  __syncthreads();\n  long long step", "  long long step", training),
    ("loss", "dx[v * CLASSES + c] = 0;", ";", training),
    ("loss", "if (mass == 0) mass = 1;", "", test_loss_where_nothing_counts),
    ("loss", "!weight || weight[c] != 0", "true", test_loss_of_a_label_that_weighs_nothing),
    ("loss", "top == top; c++", "true; c++", confusions),
    ("loss", "!(x[c] <= top)", "x[c] > top", confusions),
    ("loss", "!(x[c] <= top)", "!(x[c] < top)", confusions),
    ("loss", "label >= 0 && label < classes ? label : classes", "label < classes ? label : classes",
     confusions),
    ("loss", "blockIdx.y * cells + i", "i", confusions),
    ("loss", "table[i] = 0;\n  __syncthreads();", "table[i] = 0;", confusions),
    ("loss", "  }\n  __syncthreads();\n  for (int i = threadIdx.x; i < cells",
     "  }\n  for (int i = threadIdx.x; i < cells", confusions),
    ("loss", "(first + v) * classes", "v * classes", confusions),
    ("optim", "chunk[1] + threadIdx.x; i < chunk[2]; i += blockDim.x) {\n    float p",
     "chunk[1] + threadIdx.x; i <= chunk[2]; i += blockDim.x) {\n    float p", sgd),
    ("optim", "g + momentum * v : v", "v : v", sgd),
    ("optim", "sqrtf(s) / root + eps", "(sqrtf(s) + eps) / root * root", adamw),
    ("optim", "arrays + 4 * chunk[0]", "arrays + 3 * chunk[0]", adamw),
    ("optim", "x[i] + decay", "a[i] + decay", averages),
])
def test_a_planted_error_is_seen(cuda, monkeypatch, file, old, new, check):
    check(cuda)
    with mutated(file, old, new), pytest.raises((AssertionError, emulator.Fault)):
        for order in emulator.ORDERS:
            monkeypatch.setattr(emulator, "order", order)
            check(cuda)

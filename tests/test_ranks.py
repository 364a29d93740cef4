"""Several ranks do what one does: to rounding where they sum, to the bit where they share work.

What needs no MPI is tested on threads that meet at a barrier. The rest begins this file by mpiexec:
`python test_ranks.py NAME ...` runs the program of that name.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import draw_nothing
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import checkpoint, files, losses, ops, train
from tinyseg.data import decathlon, sampling
from tinyseg.job import Settings, pages, prepare, stages
from tinyseg.ranks import ALONE, BUCKET, Alone, Stopped

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent),
                                                       os.environ["PATH"]]))
mpi = pytest.mark.skipif(not (MPIEXEC and importlib.util.find_spec("mpi4py")),
                         reason="no mpi4py or no mpiexec")
SMALL = ["--patch", "8", "16", "16", "--steps-2d", "3", "--steps-3d", "3", "--batch", "5",
         "--folds", "2", "--seed", "3", "--head", "linear", "--spacing", "5", "6", "6",
         "--augment", "mild"]


class Together(Alone):
    """Ranks that are threads."""

    def __init__(self, rank, size, meeting, given):
        self.rank, self.size, self.meeting, self.given = rank, size, meeting, given

    def gather(self, value):
        self.given[self.rank] = value
        self.meeting.wait(10)
        found = list(self.given)
        self.meeting.wait(10)
        return found


def on_threads(size, function):
    """What function(ranks) gives on each of so many."""
    meeting, given = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, [Together(r, size, meeting, given) for r in range(size)]))


def cut(array, sizes):
    return np.split(array, np.cumsum(sizes)[:-1])


@given(st.integers(1, 40), st.integers(1, 9))
def test_parts_are_all_of_it_and_differ_by_one_at_most(count, size):
    ranks = [Together(rank, size, None, None) for rank in range(size)]
    if count < size:
        with pytest.raises(ValueError, match=f"found {count} patches a step for {size} ranks"):
            ranks[0].part(count)
        return
    parts = [range(count)[each.part(count)] for each in ranks]
    assert [i for part in parts for i in part] == list(range(count))
    assert len({len(part) for part in parts}) <= 2 and min(map(len, parts)) >= 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from(
    [losses.cross_entropy, losses.dice, losses.dice_cross_entropy]), st.booleans(),
    st.integers(0, 99))
def test_the_loss_of_parts_is_that_of_the_whole(sizes, loss, weighted, seed):
    """And so are its gradients, however many voxels count in each part."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    logits, labels = rng.standard_normal((n, 3, 4, 5)), rng.integers(0, 5, (n, 3, 4))
    labels[labels == 4] = 255
    labels[0] = labels[0] if rng.random() < 0.7 else 255  # a part may hold none
    logits = np.concatenate([logits[..., :4]])
    more = {"weight": rng.random(4)} if weighted and loss is not losses.dice else {}

    def part(ranks=ALONE, mine=slice(None)):
        x = ts.Tensor(logits[mine], requires_grad=True)
        value = loss(x, labels[mine], ignore=255, ranks=ranks, **more)
        value.backward(np.asarray(1.7))
        return value.data, x.grad

    starts = np.cumsum([0, *sizes])
    found = on_threads(len(sizes), lambda ranks: part(
        ranks, slice(starts[ranks.rank], starts[ranks.rank + 1])))
    value, gradient = part()
    assert {each.tobytes() for each, _ in found} == {found[0][0].tobytes()}
    np.testing.assert_allclose(found[0][0], value, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([g for _, g in found]), gradient, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.booleans(), st.booleans(),
       st.integers(0, 99))
def test_batch_norm_of_parts_is_that_of_the_whole(sizes, relu, added, seed):
    rng, n = np.random.default_rng(seed), sum(sizes)
    x, g, more = rng.standard_normal((3, n, 2, 3, 4)) * 3 + 5
    gamma, beta = rng.standard_normal((2, 4))

    def part(arrays, ranks=ALONE):
        leaves = [ts.Tensor(a, requires_grad=True) for a in (arrays[0], gamma, beta, arrays[2])]
        mean, var = np.zeros(4), np.ones(4)
        y = ops.batch_norm(*leaves[: 3 + added], running_mean=mean, running_var=var, train=True,
                           relu=relu, ranks=ranks)
        y.backward(arrays[1])
        dx, dgamma, dbeta, dadded = (leaf.grad for leaf in leaves)
        return y.data, dx, dadded, dgamma, dbeta, mean, var

    parts = list(zip(*(cut(a, sizes) for a in (x, g, more)), strict=True))
    found = on_threads(len(sizes), lambda ranks: part(parts[ranks.rank], ranks))
    whole = part((x, g, more))
    for i, right in enumerate(whole[: 2 + added]):
        np.testing.assert_allclose(np.concatenate([each[i] for each in found]), right, atol=1e-11)
    for i in (3, 4):  # each has its share of these
        np.testing.assert_allclose(sum(each[i] for each in found), whole[i], atol=1e-10)
    for each in found:
        np.testing.assert_allclose(each[5:], whole[5:], rtol=1e-12)
        assert np.array_equal(each[5:], found[0][5:])


def test_one_value_of_a_channel_on_each_rank_is_enough_together():
    x = np.array([[1.0, 4.0], [3.0, 8.0]])

    def part(ranks):
        norm = ts.nn.BatchNorm(2)
        with ts.nn.synchronised(norm, ranks):
            y = norm(x[ranks.rank : ranks.rank + 1]).data
        with pytest.raises(ValueError, match="more than one value"):
            norm(x[:1])
        assert norm.ranks is ALONE
        with ts.nn.synchronised(norm, ALONE):
            with pytest.raises(ValueError, match="more than one value"):
                norm(x[:1])
        return y

    np.testing.assert_allclose(np.concatenate(on_threads(2, part)), [[-1, -1], [1, 1]], atol=1e-4)


def test_alone_there_is_nothing_to_do():
    ranks, x = ALONE, np.arange(3.0)
    with ranks, ranks.summing() as ready:
        assert ready is None
    assert ranks.leads and ranks.total(x) is x and ranks.agreed("a") == "a"
    assert ranks.everywhere(lambda ranks, a, *, b: (ranks.size, a, b), 2, b=3) == (1, 2, 3)
    with pytest.raises(ValueError, match="invalid literal"), ranks.pool(1) as pool:
        first = pool.submit(int, "x")
        others = [pool.submit(time.sleep, 0.05) for _ in range(20)]
        first.result()
    assert others[-1].cancelled()
    code = ("import sys, tinyseg\nassert not tinyseg.ranks.world().rank\n"
            "assert 'mpi4py' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_what_works_in_a_pool_ends_with_who_began_it(tmp_path, ending):
    code = ("import time, tinyseg\nif __name__ == '__main__':\n"
            "    with tinyseg.ranks.Alone().pool(1) as pool:\n"
            f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(pool.submit(\n"
            "            __import__('os').getpid).result()))\n"
            "        pool.submit(time.sleep, 100)\n"
            f"        open({str(tmp_path / 'begun')!r}, 'w')\n"
            "        time.sleep(100)\n")
    (tmp_path / "program.py").write_text(code)
    begun = subprocess.Popen([sys.executable, tmp_path / "program.py"])
    try:
        for path in tmp_path / "begun", tmp_path / "pid":
            while not path.exists():
                assert begun.poll() is None
                time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        begun.send_signal(ending)
        begun.wait(10)
        for _ in range(200):
            with suppress(ProcessLookupError):
                os.kill(worker, 0)
                time.sleep(0.05)
                continue
            break
        else:
            raise AssertionError("the worker lives on")
    finally:
        begun.kill()


@pytest.mark.parametrize("module, told", [
    ("raise ImportError('none')", "need mpi4py to work together: pip install tinyseg[mpi] (none)"),
    ("class MPI:\n    class COMM_WORLD:\n        size = 1",
     "of which mpi4py finds 1: it is of another MPI")])
@pytest.mark.parametrize("name", ts.ranks.BEGUN)
def test_processes_that_do_not_know_of_each_other_are_refused(name, module, told, tmp_path):
    (tmp_path / "mpi4py.py").write_text(module)
    found = subprocess.run([sys.executable, "-c", "import tinyseg; tinyseg.ranks.world()"],
                           env=os.environ | {name: "3", "PYTHONPATH": str(tmp_path)},
                           capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1 and "mpiexec began 3 processes" in found.stderr
    assert told in found.stderr


class Comm:
    """What a World needs of MPI for its sums, on threads."""

    def __init__(self, ranks):
        self.ranks = ranks

    def allgather(self, value):
        return self.ranks.gather(value)

    def Iallreduce(self, _, array):  # noqa: N802
        def wait():
            array[...] = sum(self.ranks.gather(array.copy()))
        return SimpleNamespace(Test=lambda: False, Wait=wait)


@pytest.mark.parametrize("way", ["nccl", "staged", "host"])
def test_gradients_on_gpus_are_summed_by_nccl_or_by_way_of_the_host(way, cuda, monkeypatch):
    """On the stand-in for CuPy: calls, their order and arguments are what it shows."""
    monkeypatch.setattr(ts.ranks, "_mpi", lambda: SimpleNamespace(IN_PLACE=None))
    monkeypatch.setattr(ts.ranks, "BUCKET", 100)
    ranks, streams = {}, {}

    class Nccl:
        """Its communicator, which sums at once: one order in which a stream may run."""

        def __init__(self, size, name, rank):
            assert (size, name) == (2, "name")
            self.rank = rank

        def allReduce(self, source, target, count, kind, operation, stream):  # noqa: N802
            assert source == target and operation == "sum"
            assert streams[stream][-1] == "waits"  # until what it sums is computed
            here = np.ctypeslib.as_array((kind * count).from_address(source))
            here[...] = sum(ranks[self.rank].gather(here.copy()))

    class Stream:
        def __init__(self, non_blocking=False):
            self.ptr = id(self)
            streams[self.ptr] = self.done = []

        def wait_event(self, event):
            self.done.append("waits")

        def record(self):
            self.done.append("recorded")

    current = Stream()
    monkeypatch.setattr(cuda, "cuda", SimpleNamespace(
        **vars(cuda.cuda) | {"Stream": Stream, "get_current_stream": lambda: current},
        nccl=SimpleNamespace(
            available=way == "nccl", NCCL_FLOAT32=ctypes.c_float, NCCL_FLOAT64=ctypes.c_double,
            NCCL_SUM="sum", get_unique_id=lambda: "name", NcclCommunicator=Nccl)))
    library = np if way == "host" else cuda

    def part(mine):
        ranks[mine.rank] = mine
        world = ts.ranks.World.__new__(ts.ranks.World)
        world.comm, world.rank, world.size = Comm(mine), mine.rank, mine.size
        leaves = [ts.Tensor(library.asarray(np.full(shape, 1.0 + mine.rank, kind)))
                  for shape, kind in (((3, 4), "float32"), ((5, 7), "float32"), ((2,), "float64"),
                                      ((6,), "float32"))]
        with world.summing() as ready:
            for i, leaf in enumerate(leaves):
                leaf.grad = leaf.data * (i + 1.0)
                ready(leaf)
        return [ts.to_numpy(leaf.grad) for leaf in leaves]

    for grads in on_threads(2, part):
        for i, grad in enumerate(grads):
            np.testing.assert_array_equal(grad, np.full(grad.shape, 3.0 * (i + 1)))
    others = [done for ptr, done in streams.items() if ptr != current.ptr]
    assert others == [["waits", "recorded"] * 4] * 2 * (way == "nccl")
    assert current.done.count("waits") == 8 * (way == "nccl")  # for each sum, before it is used


# Programs, each begun on several ranks.

def network(seed=0):
    """A small 3D network with batch-norms, in float64: sums of any order agree."""
    net = ts.models.resnet_seg(rank=3, in_channels=1, classes=3, width=4, seed=seed)
    for tensor in net.parameters():
        tensor.data = tensor.data.astype("float64")
    for _, layer in net.named(ts.nn.BatchNorm):
        layer.running_mean, layer.running_var = (
            a.astype("float64") for a in (layer.running_mean, layer.running_var))
    return net


def batch(count, only=slice(None)):
    def draw(step):
        rng = np.random.default_rng(step)
        images = rng.standard_normal((count, 9, 17, 16, 1))
        return images[only], (images[only, ..., 0] > 0.5).astype("uint8") * (1 + step % 2)
    return draw


def learn(ranks, net, out, count, steps, local):
    """Every rank writes what it ends with."""
    optimizer = ts.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    with ts.nn.synchronised(net, ALONE if local else ranks):
        found = [(record.loss, record.overlap) for record in train.fit(
            net, batch(count, ranks.part(count)),
            lambda x, y: losses.dice_cross_entropy(x, y, ranks=ranks), optimizer, steps,
            ranks=ranks)]
    files = {name.replace(".", "/"): a for name, a in net.state().items()}
    np.savez(f"{out}_{ranks.size}_{ranks.rank}.npz", loss=[x for x, _ in found],
             overlap=[x for _, x in found], **files)


def together(out, local):
    with ts.ranks.world() as ranks:
        if ranks.leads:
            ranks.everywhere(learn, network(), out, 5, 4, local == "local")


def read(path):
    with np.load(path) as file:
        return dict(file)


def sums(out):
    """Gradients of two kinds of numbers, in more than one bucket."""
    with ts.ranks.world() as ranks:
        if ranks.leads:
            ranks.everywhere(_sums, out)


def _sums(ranks, out):
    rng = np.random.default_rng(ranks.rank)
    leaves = [ts.Tensor(np.asarray(rng.standard_normal(shape), kind), requires_grad=True)
              for shape, kind in (((3, 5), "float32"), ((BUCKET // 4,), "float32"),
                                  ((7,), "float64"), ((), "float32"), ((2, 600_000), "float32"))]
    with ranks.summing() as ready:
        for leaf in leaves:
            leaf.grad = np.asarray(leaf.data * 2)
            ready(leaf)
        with pytest.raises(RuntimeError, match="ready twice"):
            ready(leaves[1])
        assert [len(each) for each in ranks.gather(leaves)] == [5] * ranks.size  # on the way
    for i, leaf in enumerate(leaves):
        right = sum(np.asarray(each[i]) * 2.0 for each in ranks.gather([x.data for x in leaves]))
        np.testing.assert_allclose(leaf.grad, right, rtol=1e-5, atol=1e-5)
    Path(f"{out}_{ranks.rank}").touch()


def faults(out):
    """What all tell alike is raised, and they go on; then one dies of something else."""
    with ts.ranks.world() as ranks:
        if ranks.leads:
            for kind in (FloatingPointError, Stopped):
                with pytest.raises(kind):
                    ranks.everywhere(_raise, kind)
            assert ranks.everywhere(_count) == ranks.size
            Path(out).touch()
            ranks.everywhere(_die)


def _raise(ranks, kind):
    raise kind


def _count(ranks):
    return ranks.total(np.ones(1)).item()


def _die(ranks):
    if ranks.rank == 1:
        raise RuntimeError("a fault of rank one")
    ranks.gather(None)  # which never comes to an end


def small(script, *words):
    """The main job, the study, or a command, with two blocks and no figures, as in
    test_faults; on one thread, as the bits depend on how work is cut."""
    ts.parallel.set_threads(1)
    change = pytest.MonkeyPatch()
    draw_nothing(change)
    change.setattr(pages, "of_study", lambda *content: None)
    sys.path.insert(0, str(ROOT / "examples"))
    change.setitem(ts.models.BACKBONES, "resnet18", ((1, 1, 0, 0), False))
    return importlib.import_module(script).main(list(words))


def slow(folder, *words):
    """The main job; ranks tell their process, and steps and checkpoints take their time."""
    stages.SAVE_EVERY = 0.0
    original = sampling.batch

    def late(*args, **options):
        time.sleep(0.3)
        return original(*args, **options)

    sampling.batch = late
    Path(folder, f"pid_{os.environ['PMI_RANK']}").write_text(str(os.getpid()))
    return small("train_pancreas_3d", *words)


def broken(fault, *words):
    """A command in which one rank fails, the leader by Ctrl-C and another by anything else."""
    from tinyseg.job import predict

    one = predict._one

    def fails(*args, **options):
        if (os.environ["PMI_RANK"] == "0") == (fault == "KeyboardInterrupt"):
            raise KeyboardInterrupt if fault == "KeyboardInterrupt" else AssertionError
        return one(*args, **options)

    predict._one = fails
    return small("tinyseg.__main__", *words)


def begin(size, *words, **options):
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(([MPIEXEC, "-n", str(size)] if size > 1 else []) + command,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(size, *words, code=0):
    process = begin(size, *words)
    out, told = process.communicate(timeout=240)
    assert process.returncode == code, told
    return out, told


@mpi
@pytest.mark.parametrize("size", [2, 4])
def test_training_on_ranks_is_training_on_one(size, tmp_path):
    """Five patches a step: parts are uneven. All ranks end with the same bits."""
    learn(ALONE, network(), tmp_path / "x", 5, 4, False)
    run(size, "together", tmp_path / "x", "all")
    one, *others = (read(tmp_path / f"x_{n}_{rank}.npz")
                    for n, rank in [(1, 0), *((size, rank) for rank in range(size))])
    assert one["loss"][-1] != one["loss"][0] and len(one) > 60
    for name, right in one.items():
        np.testing.assert_allclose(others[0][name], right, rtol=1e-7, atol=1e-9)
        for other in others[1:]:
            assert np.array_equal(other[name], others[0][name])


@mpi
def test_local_batch_norm_is_another_training_with_the_same_weights_everywhere(tmp_path):
    run(2, "together", tmp_path / "x", "local")
    learn(ALONE, network(), tmp_path / "x", 5, 4, False)
    one, two = (read(tmp_path / f"x_2_{rank}.npz") for rank in range(2))
    apart = {name for name in one if not np.array_equal(one[name], two[name])}
    assert apart and all("running" in name for name in apart)
    assert abs(one["loss"][0] - read(tmp_path / "x_1_0.npz")["loss"][0]) > 1e-6


@mpi
def test_gradients_are_summed_in_buckets(tmp_path):
    run(3, "sums", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"x_0", "x_1", "x_2"}


@mpi
def test_a_fault_of_one_rank_ends_all_and_is_told(tmp_path):
    began = time.monotonic()
    _, told = run(3, "faults", tmp_path / "reached", code=1)
    assert time.monotonic() - began < 60 and (tmp_path / "reached").exists()
    assert "rank 1 of 3 failed" in told and "a fault of rank one" in told


@pytest.fixture(scope="module")
def alone(tiny_task, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, "small", "train_pancreas_3d", "--data", tiny_task, "--out", out, *SMALL)
    return out


def results(out):
    """history.csv without times, metrics.json without where things are, and the label maps."""
    rows = [line.split(",") for line in (out / "history.csv").read_text().splitlines()]
    timed = {i for i, name in enumerate(rows[0]) if name in ("seconds", "waited")}
    history = [[x for i, x in enumerate(row) if i not in timed] for row in rows]
    maps = {str(path.relative_to(out)): files.unpacked(path).read()
            for path in sorted(out.glob("predictions*/*"))}
    return history, json.loads((out / "metrics.json").read_text("utf-8")), maps


@mpi
def test_scores_and_predictions_do_not_depend_on_who_makes_them(tiny_task, alone, tmp_path):
    """The networks of one process, scored by three ranks, and predicted by two."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    for path in [out / "metrics.json", *out.glob("predictions*/*")]:
        path.unlink()
    run(3, "small", "train_pancreas_3d", "--resume", "--out", out)
    (_, theirs, found), (_, metrics, maps) = results(out), results(alone)
    assert theirs["models"] == metrics["models"] and found == maps and len(maps) == 6
    scans = tmp_path / "scans"
    shutil.copytree(tiny_task / "imagesTr", scans)
    (scans / "phantom_001.nii.gz").write_bytes(b"no scan")
    _, told = run(2, "small", "tinyseg.__main__", "predict", out / "model_3d.npz", scans,
                  tmp_path / "maps", code=1)
    assert told.count("error: ") == 1 and "phantom_001" in told
    assert len(list((tmp_path / "maps").iterdir())) == 3


@mpi
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_ends_all_and_others_go_on(victim, tiny_task, alone, tmp_path):
    """In the second stage; another number of ranks ends the run. It leaves the same files as one
    process does, and in float32 the same losses but for rounding."""
    out = tmp_path / "run"
    process = begin(2, "slow", tmp_path, "--data", tiny_task, "--out", out, *SMALL)
    while process.poll() is None:
        time.sleep(0.02)
        with suppress(OSError):
            if "\n3d," in (out / "history.csv").read_text():
                os.kill(int((tmp_path / f"pid_{victim}").read_text()), signal.SIGKILL)
                break
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 20
    _, place = checkpoint.read(out / "checkpoint.npz")  # whole
    assert place["stage"] == "3d" and place["step"] < 3
    told, _ = run(3, "small", "train_pancreas_3d", "--resume", "--out", out)
    assert told.count("held-out cases; see") == 1  # one of them speaks
    (one, metrics, maps), (two, theirs, found) = results(alone), results(out)
    assert one[0] == two[0] and len(one) == len(two) == 7 and one[1][:2] == two[1][:2]
    losses = [[float(row[2]) for row in rows[1:]] for rows in (one, two)]
    np.testing.assert_allclose(*losses, rtol=5e-3)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert maps.keys() == found.keys() and metrics["models"].keys() == theirs["models"].keys()
    for name, model in metrics["models"].items():
        assert list(model["cases"]) == list(theirs["models"][name]["cases"])


@mpi
def test_more_ranks_than_patches_are_refused(tiny_task, tmp_path):
    words = [*SMALL[:SMALL.index("--batch")], "--batch", "1", *SMALL[SMALL.index("--folds"):]]
    _, told = run(2, "small", "train_pancreas_3d", "--data", tiny_task, "--out", tmp_path / "run",
                  *words, code=1)
    assert "found 1 patches a step for 2 ranks" in told and "Traceback" not in told
    assert not list((tmp_path / "run").glob("run.json"))  # so that it can be asked for again


def test_a_plan_that_is_made_has_a_patch_for_each_rank(tiny_task, capsys):
    asked = Settings(data=tiny_task, patch=(8, 16, 16), head="linear")
    for ranks, batch in ((1, 2), (2, 2), (5, 5)):
        assert prepare.decide(asked, decathlon.load(tiny_task), (), ranks).batch_3d == batch
        assert ("a patch for each of 5 ranks: --batch 5" in capsys.readouterr().out) == (ranks == 5)


@mpi
@pytest.mark.parametrize("fault, code, told", [
    ("AssertionError", 1, "rank 1 of 2 failed"), ("KeyboardInterrupt", 130, "stopped")])
def test_what_ends_a_rank_ends_predicting_and_is_told(fault, code, told, tiny_task, alone,
                                                      tmp_path):
    """No rank waits for one that is gone; Ctrl-C, which the leader gets, is no fault."""
    _, found = run(2, "broken", fault, "predict", alone / "model_3d.npz", tiny_task / "imagesTr",
                   tmp_path / "maps", code=code)
    assert told in found and ("Traceback" in found) == (code == 1)


@mpi
def test_ctrl_c_stops_after_a_step_and_the_run_goes_on(tiny_task, tmp_path):
    out = tmp_path / "run"
    process = begin(2, "slow", tmp_path, "--data", tiny_task, "--out", out, *SMALL)
    while not (out / "checkpoint.npz").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(int((tmp_path / "pid_0").read_text()), signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert "stopping after this step" in told and "go on with --resume" in told
    assert process.returncode == 130
    arrays, told = checkpoint.read(out / "checkpoint.npz")
    assert arrays and told["stage"] == "2d" and 1 <= told["step"] <= 3


@mpi
def test_a_study_spread_over_ranks_is_that_of_one_process(tiny_task, tmp_path):
    """Runs are independent: the same bits."""
    words = ["--data", tiny_task, "--ways", "random", "zero", "--folds", "2", "--patch", "8", "16",
             "16", "--steps-2d", "1", "--steps-3d", "1", "--batch", "1", "--head", "linear",
             "--spacing", "5", "6", "6", "--augment", "mild"]
    for size in (1, 3):
        run(size, "small", "compare_inflation", *words, "--out", tmp_path / str(size))
    one, three = ((tmp_path / str(size) / "scores.csv").read_text() for size in (1, 3))
    assert one == three and one.count("\n") == 1 + 3 * 2 * 2  # ways, cases, classes
    logs = list((tmp_path / "3").rglob("*.log"))
    assert len(logs) == 3 and all("held-out cases; see" in log.read_text() for log in logs)


if __name__ == "__main__":
    sys.exit({each.__name__: each for each in (
        together, sums, faults, small, slow, broken)}[sys.argv[1]](*sys.argv[2:]))

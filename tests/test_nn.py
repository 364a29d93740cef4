"""Modules: names and their order, states, modes, copies, and layers against their operations."""

import gc
from typing import NamedTuple

import numpy as np
import pytest

from tinyseg import Tensor, losses, nn, no_grad, ops, optim
from tinyseg.module import evaluation


def rng(seed=0):
    return np.random.default_rng(seed)


class Net(nn.Module):
    """Every way to hold a layer: attribute, list, dict, Sequential, and none."""

    def __init__(self, seed=0):
        r = rng(seed)
        self.stem = nn.Conv(2, 3, (3, 2), padding=(1, (0, 1)), padding_mode="edge", rng=r)
        self.bn = nn.BatchNorm(3)
        self.blocks = [nn.Conv(3, 3, (1, 1), bias=False, rng=r), nn.GroupNorm(3, groups=3)]
        self.heads = {"b": nn.Linear(3, 4, rng=r), "a": nn.Sequential(nn.ReLU(), nn.BatchNorm(3))}
        self.scale = Tensor(np.ones(1, "float32"), requires_grad=True)
        self.missing, self.name, self.number = None, "net", 3

    def forward(self, x):
        x = self.bn(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.heads["b"](self.heads["a"](x) * self.scale)


PARAMETERS = ["stem.weight", "stem.bias", "bn.weight", "bn.bias", "blocks.0.weight",
              "blocks.1.weight", "blocks.1.bias", "heads.b.weight", "heads.b.bias",
              "heads.a.1.weight", "heads.a.1.bias", "scale"]
STATISTICS = {"bn.running_mean", "bn.running_var", "heads.a.1.running_mean",
              "heads.a.1.running_var"}


def images(seed=1, dtype="float32"):
    return rng(seed).standard_normal((2, 4, 5, 2)).astype(dtype)


def test_names_and_their_order():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == PARAMETERS
    assert [id(p) for p in net.parameters()] == [id(p) for _, p in net.named_parameters()]
    assert all(p.requires_grad for p in net.parameters())
    assert set(net.state()) == {*PARAMETERS, *STATISTICS}
    assert [n for n in net.state() if n in PARAMETERS] == PARAMETERS
    modules = [name for name, _ in net.named(nn.Module)]
    assert modules == ["stem", "bn", "blocks.0", "blocks.1", "heads.b", "heads.a", "heads.a.0",
                       "heads.a.1"]


def test_a_long_sequence_keeps_its_order():
    net = nn.Sequential(*(nn.Linear(1, 1, rng=rng(i)) for i in range(12)))
    assert [n for n, _ in net.named(nn.Module)] == [str(i) for i in range(12)]
    for i, p in enumerate(net.parameters()):
        p.data[...] = 1 + i // 2 if i % 2 == 0 else i // 2
    expected = 1.0
    for i in range(12):
        expected = expected * (i + 1) + i
    assert net(np.ones((1, 1), "float32")).data == np.float32(expected)


def test_a_state_is_a_copy_and_loads_back():
    net, other = Net(0), Net(1)
    net(images())
    state = net.state()
    kept = {name: array.copy() for name, array in state.items()}
    for p in net.parameters():
        p.data += 1
    net.bn.running_mean += 1
    assert all((state[name] == kept[name]).all() for name in kept)
    held = {name: id(p.data) for name, p in other.named_parameters()}
    other.load_state({k: v.astype("float64") for k, v in state.items()})
    assert all((a == kept[n]).all() and a.dtype == "float32" for n, a in other.state().items())
    assert held == {name: id(p.data) for name, p in other.named_parameters()}  # in place
    assert not any(np.shares_memory(p.data, state[n]) for n, p in other.named_parameters())


def wrong_states(state):
    yield {**state, "scale": np.zeros((2, 1))}, "scale has shape"
    yield {**state, "scale": np.zeros(())}, "scale has shape"  # would broadcast
    yield {k: v for k, v in state.items() if k != "scale"}, "scale is missing"
    yield {**state, "more": np.zeros(1)}, "more is unexpected"
    yield {}, "stem.weight is missing"
    yield {**state, "scale": np.array(["one"])}, "scale"  # not numbers
    yield {**state, "scale": np.array([1j])}, "scale holds complex128, expected.*float32"
    yield {**state, "scale": [1.0]}, "scale is a builtins.list, expected a NumPy"
    yield {**state, "scale": Foreign()}, "scale is a test_nn.Foreign, expected a NumPy"


class Foreign:
    """An array of a library with its own kind of dtype, as PyTorch's is."""

    shape, dtype = (1,), "float32"


@pytest.mark.parametrize("case", range(9))
def test_a_state_that_does_not_fit_writes_nothing(case):
    net = Net(0)
    state, words = list(wrong_states({k: v + 1 for k, v in net.state().items()}))[case]
    before = net.state()
    with pytest.raises(ValueError, match=words):
        net.load_state(state)
    assert all((array == before[name]).all() for name, array in net.state().items())


def test_nothing_is_written_where_one_array_is_read_only():
    net = Net(0)
    net.scale.data = np.broadcast_to(net.scale.data, (1,))
    before = net.state()
    with pytest.raises(ValueError, match="scale is read-only"):
        net.load_state({name: array + 1 for name, array in before.items()})
    assert all((array == before[name]).all() for name, array in net.state().items())


def test_a_state_may_hold_tensors_and_numbers_of_numpy():
    net = Net(0)
    net.single = Tensor(np.array(1, "float32"))
    net.load_state({"scale": Tensor(np.array([3.0])), "single": np.float64(4)}, strict=False)
    assert net.scale.data == 3 and net.single.data == 4 and net.single.dtype == "float32"


def test_loading_a_part():
    net, before = Net(0), Net(0).state()
    net.load_state({"scale": np.array([5.0]), "more": np.zeros(3)}, strict=False)
    after = net.state()
    assert after.pop("scale") == 5
    assert all((array == before[name]).all() for name, array in after.items())
    with pytest.raises(ValueError, match="scale has shape"):
        net.load_state({"scale": np.zeros(3)}, strict=False)


def test_an_error_names_all_that_is_wrong_but_not_without_end():
    many = nn.Sequential(*(nn.Linear(1, 1, rng=rng()) for _ in range(30)))
    with pytest.raises(ValueError, match="and 40 more") as error:
        many.load_state({})
    assert len(str(error.value).splitlines()) == 22


def test_astype():
    net = Net()
    net(images()).sum().backward()
    assert net.astype("float64") is net
    assert {a.dtype.name for a in net.state().values()} == {"float64"}
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net(images(dtype="float64")).dtype == "float64"
    assert net.astype("float32")(images()).dtype == "float32"


def test_a_copy_shares_nothing():
    net = Net()
    net(images()).sum().backward()
    twin = net.copy()
    ours, theirs = (dict(n.named(object)) for n in (net, twin))
    assert list(ours) == list(theirs)
    for name, a in ours.items():
        b = theirs[name]
        assert a is not b
        if isinstance(a, Tensor):
            assert (a.data == b.data).all() and not np.shares_memory(a.data, b.data)
            assert b.requires_grad and not np.shares_memory(a.grad, b.grad)
        elif isinstance(a, np.ndarray):
            assert (a == b).all() and not np.shares_memory(a, b)
    before = net.state()
    for p in twin.parameters():
        p.data += 1
    twin(images())
    assert all((array == before[name]).all() for name, array in net.state().items())


def test_convert_reaches_every_array():
    net, seen = Net(), []

    def double(array):
        seen.append(array.shape)
        return array * 2

    before = net.state()
    net.convert(double)
    assert len(seen) == len(before)
    assert all((array == 2 * before[name]).all() for name, array in net.state().items())


class Pair(NamedTuple):
    """A tuple with names, which go as the numbers do."""

    conv: nn.Conv
    norm: nn.BatchNorm


class Holder(nn.Module):
    """Any attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", [tuple, lambda layers: Pair(*layers), lambda layers: (layers,),
                                  lambda layers: {"a": tuple(layers)}])
def test_modules_in_a_tuple_are_modules(kind):
    layers = [nn.Conv(1, 2, (3, 3), rng=0), nn.BatchNorm(2)]
    net, listed = Holder(rest=kind(layers)), Holder(rest=layers)
    assert net.parameters() == listed.parameters() and len(net.parameters()) == 4
    assert net.modules()[1:] == listed.modules()[1:] and len(net.statistics()) == 2
    assert net.eval() and not layers[1].training
    assert net.astype("float64") and layers[1].running_var.dtype == "float64"
    prefix = {Pair: "rest.", tuple: "rest."}.get(type(net.rest), "rest.a.")
    prefix += "0." if type(net.rest) is tuple and len(net.rest) == 1 else ""
    assert list(net.state())[::2] == [f"{prefix}{name}" for name in (
        "0.weight", "1.weight", "1.running_mean")]


def test_two_things_of_one_name_are_refused():
    for net in (Holder(d={0: nn.BatchNorm(2), "0": nn.BatchNorm(2)}),
                Holder(**{"d.0": nn.ReLU(), "d": [nn.ReLU()]})):
        for names in (net.state, net.parameters, net.eval):
            with pytest.raises(ValueError, match=r"two things of the name d\.0"):
                names()
    options = Holder(labels={0: "a", "0": "b"}, conv=nn.Conv(1, 1, (1,), rng=0))
    assert list(options.state()) == ["conv.weight", "conv.bias"]


def test_an_activation_kept_is_no_state():
    net = Holder(conv=nn.Conv(1, 3, (3,), padding=1, rng=0))
    state = net.state()
    net.last = net.conv(np.ones((1, 4, 1), "float32"))
    assert list(net.state()) == list(state) and len(net.parameters()) == 2
    net.load_state(state)
    assert net.astype("float64").last.dtype == "float32" and "last" not in repr(net)
    with no_grad():
        net.last = net.conv(np.ones((1, 4, 1), "float32"))
    assert list(net.state()) == list(state) and len(net.parameters()) == 2


def test_a_frozen_tensor_is_a_parameter_and_a_number_of_numpy_an_option():
    net = Holder(frozen=Tensor(np.ones(2, "float32")), factor=np.float32(2), kind=np.float32)
    assert list(net.state()) == ["frozen"] and net.parameters() == [net.frozen]
    net.load_state({"frozen": np.zeros(2)})
    assert net.frozen.data.tolist() == [0, 0] and net.factor == 2
    assert net.astype("float64").factor.dtype == "float32" and net.kind is np.float32


def test_arrays_of_integers_are_state_and_keep_their_type():
    net = Holder(order=np.array([2, 0, 1]), mask=np.array([True, False]), table=np.ones(3))
    assert not net.parameters() and len(net.statistics()) == 3
    state = net.astype("float32").state()
    assert [a.dtype for a in state.values()] == ["int64", "bool", "float32"]
    with pytest.raises(ValueError, match="order holds float32, expected numbers that int64"):
        net.load_state({**state, "order": np.ones(3, "float32")})
    net.load_state({**state, "order": np.array([1, 2, 0])})
    assert net.order.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="dtype is 'int64'; expected one of floating-point"):
        net.astype("int64")


def test_what_is_shared_is_converted_once_and_stays_shared():
    a, b = nn.BatchNorm(3), nn.BatchNorm(3)
    b.weight, b.running_var = a.weight, a.running_var
    tables, moved = [np.ones(2), (np.ones(3), {"x": a.running_var})], []
    net = Holder(a=a, b=b, tables=tables, pair=Pair(np.ones(1), None))
    names = list(net.state())
    net.convert(lambda array: moved.append(array) or array + 1)
    assert a.weight is b.weight and a.running_var is b.running_var is tables[1][1]["x"]
    assert len(moved) == len(names) and list(net.state()) == names
    assert all((array == (1 if "bias" in name or "mean" in name else 2)).all()
               for name, array in net.state().items())
    assert net.tables is tables and type(net.pair) is Pair and net.pair.norm is None


def test_what_describes_a_network_is_no_part_of_it():
    net = Holder(config={"mean": np.ones(2)}, metadata={"net": nn.ReLU()}, norm=nn.BatchNorm(1))
    inner = Holder(net=net)
    assert {name.split(".")[1] for name, _ in inner.named() if "." in name} == {"norm"}
    assert net.astype("float32").config["mean"].dtype == "float64"


def test_changes_in_place_are_counted():
    net = Net()
    net.load_state(net.state())
    net.load_state({"scale": np.zeros(1)}, strict=False)
    assert {name: p.version for name, p in net.named_parameters()} == {
        name: 1 + (name == "scale") for name in PARAMETERS}
    assert all(p.version == 2 + (p is net.scale) for p in net.astype("float64").parameters())


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int32", "float16", "float64"])
def test_a_plain_array_takes_the_type_of_the_network(dtype):
    net, image = Net().eval(), rng().integers(0, 2, (1, 4, 5, 2)).astype(dtype)
    y = net(image)
    assert y.dtype == "float32" and (y.data == net(image.astype("float32")).data).all()
    assert net.astype("float64")(image).dtype == "float64"
    assert nn.Identity()(image).dtype == dtype  # no parameters, no type
    assert net.astype("float32")(Tensor(image.astype("float64"))).dtype == "float64"


def statistics(net):
    return {name: array for name, array in net.state().items() if name in STATISTICS}


def rests(net):
    """The names of what a step of training leaves as it is."""
    net, before = net.copy(), net.state()
    optimizer = optim.SGD(net.parameters(), 0.01)
    (net(rng(5).standard_normal((3, 4, 5, 2), "float32")) ** 2).mean().backward()
    optimizer.step()
    return {name for name, a in net.state().items() if (a == before[name]).all()}


@pytest.mark.parametrize("prefix, resting", [
    ("bn", {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}),
    ("heads.a", {f"heads.a.1.{k}" for k in ("weight", "bias", "running_mean", "running_var")}),
    ("stem.weight", {"stem.weight"}), ("scale", {"scale"}),
    ("blocks", {"blocks.0.weight", "blocks.1.weight", "blocks.1.bias"}),
])
def test_what_is_frozen_rests(prefix, resting):
    net = Net()
    assert rests(net) == set()
    assert net.freeze(prefix) is net
    assert rests(net) == rests(net.train()) == rests(net.eval().train()) == resting
    assert rests(net.copy()) == resting
    assert rests(net.train("running")) == resting | STATISTICS
    assert net.unfreeze(prefix) is net and rests(net.train()) == set()


def test_a_frozen_batch_norm_uses_its_running_statistics():
    net, x = Net(), rng(1).standard_normal((3, 4, 5, 2), "float32")
    net(x)  # statistics of something
    frozen, evaluated = net.copy().freeze("bn").freeze("heads.a"), net.copy().eval()
    assert (frozen(x).data == evaluated(x).data).all() and frozen.training
    assert (frozen.unfreeze()(x).data == net(x).data).all()


def test_freezing_forgets_gradients_and_adds_up():
    net = Net()
    net(rng(1).standard_normal((3, 4, 5, 2), "float32")).sum().backward()
    net.freeze("stem").freeze("bn").freeze("stem.bias")
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == PARAMETERS[:4] and net.bn.frozen and not net.heads["a"][1].frozen
    assert [p.grad is None for p in net.parameters()] == [name in frozen for name in PARAMETERS]
    net.unfreeze("stem.weight")
    assert net.stem.weight.requires_grad and not net.stem.bias.requires_grad
    net.freeze()
    assert not any(p.requires_grad for p in net.parameters()) and net.heads["a"][1].frozen
    net.table = Tensor(np.arange(3))  # a parameter of integers, which have no gradient
    net.unfreeze()
    assert [p.requires_grad for p in net.parameters()] == [True] * len(PARAMETERS) + [False]
    bn = nn.BatchNorm(3).freeze()
    assert bn.frozen and not bn.weight.requires_grad


def test_a_name_that_nothing_has_cannot_be_frozen():
    net = Net()
    for change in (net.freeze, net.unfreeze):
        for wrong in ("ste", "head", "name", "heads.a.0", "bn.running_mean", "stem."):
            with pytest.raises(ValueError, match=f"Net holds nothing of the name '{wrong}'"):
                change(wrong)
    with pytest.raises(ValueError, match="one of stem, bn, blocks, heads, scale$"):
        net.freeze("layer1")
    with pytest.raises(ValueError, match=r"one of .*heads\.b, heads\.a, scale$"):
        net.freeze("heads.c")
    assert all(p.requires_grad for p in net.parameters())


def test_evaluation_leaves_every_mode_as_it_was():
    net = Net().train("running")
    net.stem.training = False
    modes = [m.training for m in net.modules()]
    with pytest.raises(OSError), evaluation(net):
        assert not any(m.training for m in net.modules())
        assert net(rng().standard_normal((1, 4, 5, 2))).node is False
        net.train()
        raise OSError
    assert [m.training for m in net.modules()] == modes
    with evaluation(lambda x: x):
        assert (net.scale * 2).node is False


def test_modes():
    net, x = Net(), images()
    assert all(m.training for _, m in net.named(nn.Module)) and net.training
    before = statistics(net)
    net(x)
    moved = statistics(net)
    assert all((before[n] != moved[n]).any() for n in STATISTICS)
    assert net.eval() is net and not net.training
    assert not any(m.training for _, m in net.named(nn.Module))
    y = net(x)
    assert all((statistics(net)[n] == moved[n]).all() for n in STATISTICS)

    assert net.train(statistics="running") is net and net.training
    frozen = {n for n, m in net.named(nn.Module) if not m.training}
    assert frozen == {"bn", "heads.a.1"}
    again = net(x)
    assert (again.data == y.data).all()
    assert all((statistics(net)[n] == moved[n]).all() for n in STATISTICS)
    losses.cross_entropy(again, np.zeros((2, 4, 5), int)).backward()
    assert all(p.grad is not None for p in net.parameters())

    net.train()
    assert all(m.training for _, m in net.named(nn.Module))
    assert (net(x).data != y.data).any()
    with pytest.raises(ValueError, match="frozen"):
        net.train(statistics="frozen")


def test_a_module_without_forward():
    with pytest.raises(NotImplementedError, match="Module"):
        nn.Module()(np.ones(2))


def test_a_network_leaves_no_cycles_behind():
    net, labels = Net(), np.zeros((2, 4, 5), int)
    while gc.collect():  # of other tests: what one pass frees may have held more
        pass
    gc.disable()
    try:
        for loss in (losses.cross_entropy, losses.dice_cross_entropy):
            y = ops.max_pool(ops.upsample(net(images()), (8, 10), align_corners=True),
                             kernel=(2, 2))
            loss(y, labels).backward()
            del y
            net(images())  # and without a walk
            assert gc.collect() == 0
    finally:
        gc.enable()


# Layers


def same(layer, x, expected):
    y = layer(x)
    assert y.data.shape == expected.data.shape and (y.data == expected.data).all()


def test_layers_are_their_operations():
    x = images()
    options = {"stride": (2, 1), "padding": (1, (1, 0)), "dilation": (1, 2),
               "padding_mode": ("edge", "zero")}
    for bias in (True, False):
        conv = nn.Conv(2, 3, (3, 2), bias=bias, rng=rng(), **options)
        assert (conv.bias is not None) == bias
        same(conv, x, ops.conv(Tensor(x), conv.weight, conv.bias, **options))
    linear = nn.Linear(2, 3, rng=rng())
    linear.bias.data += 1
    np.testing.assert_allclose(linear(x).data, x @ linear.weight.data + 1, rtol=1e-6)
    same(nn.MaxPool((2, 3)), x, ops.max_pool(Tensor(x), kernel=(2, 3)))
    same(nn.MaxPool((2, 3), 1, (0, 1)), x,
         ops.max_pool(Tensor(x), kernel=(2, 3), stride=1, padding=(0, 1)))
    norm = nn.GroupNorm(2, groups=2, eps=0.1)
    same(norm, x, ops.group_norm(Tensor(x), norm.weight, norm.bias, groups=2, eps=0.1))
    same(nn.ReLU(), x, Tensor(np.maximum(x, 0)))
    same(nn.Identity(), x, Tensor(x))
    np.testing.assert_allclose(nn.GlobalAverage()(x).data, x.mean((1, 2)), rtol=1e-5)
    assert nn.GlobalAverage(keepdims=True)(x).shape == (2, 1, 1, 2)
    same(nn.Sequential(), x, Tensor(x))


def test_a_seed_stands_for_its_generator():
    for make in (lambda rng: nn.Conv(2, 3, (3, 2), rng=rng), lambda rng: nn.Linear(4, 5, rng=rng)):
        assert (make(7).weight.data == make(rng(7)).weight.data).all()
        assert (make(7).weight.data != make(8).weight.data).all()
    generator = rng(7)  # goes on from layer to layer
    twice = [nn.Linear(2, 2, rng=generator).weight.data for _ in range(2)]
    assert (twice[0] != twice[1]).all()


def test_a_standard_deviation_of_numpy_leaves_weights_float32():
    assert nn.Conv(2, 3, (3,), std=np.sqrt(0.5), rng=0).weight.dtype == "float32"


@pytest.mark.parametrize("layer, shape, channels", [
    (nn.BatchNorm(1), (2, 3, 3, 2), 1), (nn.BatchNorm(1).eval(), (1, 3, 3, 2), 1),
    (nn.BatchNorm(3), (2, 3, 2), 3), (nn.BatchNorm(3), (), 3),
    (nn.GroupNorm(1, 1), (1, 2, 2, 4), 1), (nn.GroupNorm(4, 2), (1, 2, 2, 2), 4),
    (nn.Linear(3, 2, rng=0), (5, 4), 3),
])
def test_layers_refuse_other_numbers_of_channels(layer, shape, channels):
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}: input \({shape and shape[0]}.*"
                       f"expected {channels} channels"):
        layer(np.ones(shape, "float32"))


def test_a_sequence_has_a_length_items_and_slices():
    layers = [nn.Linear(1, 1, rng=i) for i in range(12)]
    net = nn.Sequential(*layers)
    assert len(net) == 12 and list(net) == layers and net[10] is layers[10]
    assert net[-1] is layers[11] and layers[3] in net
    for part in (slice(2, 5), slice(None, None, -1), slice(-3, None), slice(5, 2)):
        assert isinstance(net[part], nn.Sequential) and list(net[part]) == layers[part]
    with pytest.raises(IndexError):
        net[12]
    x = np.ones((1, 1), "float32")
    assert (net(x).data == net[6:](net[:6](x)).data).all() and len(nn.Sequential()) == 0
    first = vars(net).pop("0")
    vars(net)["0"] = first  # the numbers tell the order
    assert list(net) == layers


def test_a_network_shows_its_layers():
    net = Net()
    text = repr(net)
    lines = text.split("\n")
    assert lines[0].startswith("Net(scale (1,), name 'net', number 3") and lines[-1] == ")"
    for name, layer in net.named(nn.Module):
        own = next(i for i, line in enumerate(lines) if type(layer).__name__ in line
                   and line.split(":")[0].strip() in name)
        lines[own] = ""  # each has its own line
    assert sum(map(bool, lines)) == 3  # the first, the last and what closes the inner sequence
    assert "  stem: Conv(kernel (3, 2), padding ((1, 1), (0, 1)), edge (True, True), " \
           "weight (3, 2, 2, 3), bias (3,))" in text
    assert "  bn: BatchNorm(weight (3,), bias (3,), eps 1e-05, momentum 0.1)" in text
    assert "  heads.a: Sequential(\n    0: ReLU()\n" in text
    assert repr(net.eval()) == text
    net.parent = net
    assert "parent: ..." in repr(net)


def test_batch_norm_updates_its_arrays_in_place():
    layer, x = nn.BatchNorm(2, eps=0.1, momentum=0.5), images()
    mean, var = layer.running_mean, layer.running_var
    layer(x)
    assert layer.running_mean is mean and layer.running_var is var
    assert mean.dtype == var.dtype == "float32"
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)) / 2, atol=1e-6)
    np.testing.assert_allclose(var, 0.5 + x.var((0, 1, 2), ddof=1) / 2, rtol=1e-5)
    y = layer.eval()(x).data
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 0.1), rtol=1e-5, atol=1e-6)


def test_starting_weights():
    conv = nn.Conv(24, 32, (3, 3, 3), rng=rng(3))
    weight, expected = conv.weight.data, (2 / (32 * 27)) ** 0.5
    assert weight.shape == (3, 3, 3, 24, 32) and weight.dtype == "float32"
    assert weight.std() == pytest.approx(expected, rel=0.03)  # 10 standard errors
    assert abs(weight.mean()) < 5 * expected / weight.size**0.5 and (conv.bias.data == 0).all()
    assert (nn.Conv(24, 32, (3, 3, 3), rng=rng(3)).weight.data == weight).all()
    wide = nn.Conv(24, 32, (3, 3), std=0.5, rng=rng())
    assert wide.weight.data.std() == pytest.approx(0.5, rel=0.05)
    linear = nn.Linear(100, 90, rng=rng())
    assert linear.weight.data.std() == pytest.approx((2 / 100) ** 0.5, rel=0.06)
    assert (linear.bias.data == 0).all()
    head = nn.Linear(100, 90, std=0.01, rng=rng())
    assert head.weight.data.std() == pytest.approx(0.01, rel=0.06)


def test_linear_layers_of_any_width_keep_the_size_of_what_passes():
    """E[relu(w x)^2] = E[x^2] at std² = 2 / C_in: He et al. 2015, eq. 10."""
    x, generator, widths = rng(1).standard_normal((500, 300), "float32"), rng(2), (300, 900, 200)
    for c_in, c_out in zip(widths, widths[1:], strict=False):
        before = (x * x).mean()
        x = np.maximum(nn.Linear(c_in, c_out, rng=generator)(x).data, 0)
        assert (x * x).mean() == pytest.approx(before, rel=0.1)


def test_three_linear_layers_separate_two_moons():
    angle = np.linspace(0, np.pi, 100)
    moons = np.stack([np.stack([np.cos(angle), np.sin(angle)], 1),
                      np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)])
    points = (moons + 0.05 * rng().standard_normal(moons.shape)).reshape(-1, 2).astype("float32")
    labels, generator = np.repeat([0, 1], 100), rng(3)

    def right(net):
        optimizer = optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(150):
            optimizer.zero_grad()
            losses.cross_entropy(net(points), labels).backward()
            optimizer.step()
        with no_grad():
            return (net(points).data.argmax(axis=1) == labels).mean()

    assert right(nn.Linear(2, 2, rng=generator)) < 0.93  # no straight line does
    assert right(nn.Sequential(
        nn.Linear(2, 16, rng=generator), nn.ReLU(), nn.Linear(16, 16, rng=generator), nn.ReLU(),
        nn.Linear(16, 2, rng=generator))) == 1


def test_wrong_layers_are_refused_when_made():
    with pytest.raises(ValueError, match="^stride"):
        nn.Conv(2, 3, (3, 3), stride=(1, 1, 1), rng=rng())
    with pytest.raises(ValueError, match="^padding_mode"):
        nn.Conv(2, 3, (3, 3), padding_mode="reflect", rng=rng())
    with pytest.raises(ValueError, match="^padding"):
        nn.MaxPool((2, 2), padding=-1)
    for make in (lambda k: nn.Conv(1, 2, k, rng=0), nn.MaxPool):
        for kernel in (3, np.int64(3)):
            with pytest.raises(ValueError, match=r"^kernel is .*3.*\(3, 3\) for images"):
                make(kernel)
        assert make([np.int64(3), 2]).window.kernel == (3, 2)
        with pytest.raises(ValueError, match="^kernel"):
            make((3, 0))
    for groups in (0, -1, 3, 1.0, None):
        with pytest.raises(ValueError, match="^groups is .*divides the 4 channels"):
            nn.GroupNorm(4, groups)


def test_integers_given_to_a_network_may_be_indices():
    class Embedding(nn.Module):
        def __init__(self):
            self.weight = Tensor(rng().standard_normal((5, 3), "float32"), requires_grad=True)

        def forward(self, x):
            return self.weight[x]

    net = nn.Sequential(Embedding(), nn.Linear(3, 2, rng=0))
    y = net(np.array([1, 4, 1]))
    assert y.shape == (3, 2) and (y.data[0] == y.data[2]).all()


@pytest.mark.parametrize("name", ["metadata", "config", "training"])
def test_a_part_is_a_part_whatever_its_name(name):
    net = Holder(**{name: nn.Linear(2, 3, rng=0)})
    assert list(net.state()) == [f"{name}.weight", f"{name}.bias"]
    assert net.astype("float64").state()[f"{name}.bias"].dtype == "float64"


def test_another_module_may_stand_in_a_convolutions_place():
    """It is given the image alone, whatever follows it in the same pass."""
    x, added = (Tensor(rng(s).standard_normal((2, 7, 3), "float32")) for s in (0, 1))
    conv, norm = nn.Conv(3, 3, (3,), padding=1, rng=2), nn.BatchNorm(3).eval()
    norm.running_mean[...] = 0.5

    class Own(nn.Conv):
        def forward(self, x):
            return super().forward(x)

    own = Own(3, 3, (3,), padding=1, rng=2)
    for last in norm, nn.Identity():
        truth = np.maximum(last(conv(x)).data + added.data, 0)
        for first in conv, own, nn.Sequential(conv, nn.Identity()):
            y = nn.normalised(first, last, x, added, relu=True)
            np.testing.assert_allclose(y.data, truth, rtol=1e-5, atol=1e-6)
    y = nn.normalised(own, nn.Identity(), x)
    np.testing.assert_array_equal(y.data, conv(x).data)
    doubled = conv(x, (14,), Tensor(np.ones((2, 14, 3), "float32"))).data
    np.testing.assert_allclose(doubled, conv(ops.double(x, size=(14,))).data + 1, rtol=1e-5)


def test_what_computes_along_depth_adds_nothing():
    conv = nn.Conv(3, 3, (1, 3, 3), padding=(0, 1, 1), rng=0)
    conv.along = nn.Identity()
    with pytest.raises(ValueError, match="Identity computes this; add and cut afterwards"):
        conv(np.ones((1, 2, 4, 5, 3), "float32"), relu=True)

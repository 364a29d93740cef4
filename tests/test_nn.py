"""Modules: names and their order, states, modes, copies, and layers against their operations."""

import gc

import numpy as np
import pytest

from tinyseg import Tensor, losses, nn, ops


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


@pytest.mark.parametrize("case", range(6))
def test_a_state_that_does_not_fit_writes_nothing(case):
    net = Net(0)
    state, words = list(wrong_states({k: v + 1 for k, v in net.state().items()}))[case]
    before = net.state()
    with pytest.raises(ValueError, match=words):
        net.load_state(state)
    assert all((array == before[name]).all() for name, array in net.state().items())


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


def statistics(net):
    return {name: array for name, array in net.state().items() if name in STATISTICS}


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
    assert linear.weight.data.std() == pytest.approx(0.01, rel=0.06)
    assert (linear.bias.data == 0).all()


def test_wrong_layers_are_refused_when_made():
    with pytest.raises(ValueError, match="^stride"):
        nn.Conv(2, 3, (3, 3), stride=(1, 1, 1), rng=rng())
    with pytest.raises(ValueError, match="^padding_mode"):
        nn.Conv(2, 3, (3, 3), padding_mode="reflect", rng=rng())
    with pytest.raises(ValueError, match="^padding"):
        nn.MaxPool((2, 2), padding=-1)

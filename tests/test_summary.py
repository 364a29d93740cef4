"""What is told of a network's layers, against counting by hand and against gradients."""

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg import Tensor, models, nn, no_grad, ops


def seen(net, size, rank, channels=1):
    """The extent of d answer / d input along each axis, of the answer's middle position. Layers
    take means, so that no path cancels another, nothing grows and no ReLU cuts anything off."""
    for parameter in net.parameters():
        parameter.data[...] = parameter.shape[-1] / parameter.data.size
    x = Tensor(np.ones((1, *(size,) * rank, channels), "float32"), requires_grad=True)
    y = net.eval()(x)
    g = np.zeros_like(y.data)
    g[(0, *(n // 2 for n in y.shape[1:-1]), 0)] = 1
    y.backward(g)
    places = np.nonzero(x.grad)[1:-1]
    return tuple(int(p.max() - p.min() + 1) for p in places)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3),
                          st.integers(0, 2)), min_size=1, max_size=4), st.integers(1, 2))
def test_layers_in_a_row_see_what_gradients_say(layers, rank):
    net = nn.Sequential(*[
        nn.Conv(1, 1, (k,) * rank, stride=s, dilation=d, padding=min(p, (k - 1) * d), rng=i)
        for i, (k, s, d, p) in enumerate(layers)])
    told = ts.summary(net, (1, *(200,) * rank, 1)).layers[-1].sees
    assert told == seen(net, 200, rank)


@pytest.mark.parametrize("options", [{}, {"head": "fcn"}, {"output_stride": 32}])
def test_a_trunk_sees_what_gradients_say(options):
    """Also where paths join: a shortcut sees less than the convolutions beside it."""
    net = averaging("resnet18", rank=1, in_channels=1, classes=2, **options)
    trunk = [layer for layer in ts.summary(net, (1, 800, 1)).layers
             if layer.name.startswith("layer4")]
    assert trunk[-1].sees[0] > trunk[0].sees[0]
    assert trunk[-1].sees == seen(nn.Sequential(Trunk(net)), 2048, 1)


def averaging(*args, **options):
    """A network without maximum, of which only the winner has a gradient."""
    net = models.resnet_seg(*args, **options)
    window = net.maxpool.window
    net.maxpool = nn.Conv(64, 64, window.kernel, stride=window.stride, padding=window.padding,
                          rng=0)
    return net


class Trunk(nn.Module):
    """The maps of a network."""

    def __init__(self, net):
        self.net = net

    def forward(self, x):
        return self.net.features(x)


def test_a_decoder_sees_at_most_what_is_told():
    net = averaging("resnet18", rank=1, in_channels=1, classes=2, head="unet")
    told = [layer.sees[0] for layer in ts.summary(net, (1, 2048, 1)).layers]
    found = seen(net, 2048, 1)[0]
    assert found <= told[-1] <= found + 64  # two cells of the coarsest map
    assert told == sorted(told) or max(told) == told[-1]


@pytest.mark.parametrize("convolutions", [1, 2, 3, 4, 5])
def test_what_is_doubled_sees_as_much_as_its_best_position(convolutions):
    class Doubled(nn.Module):
        def __init__(self):
            self.convs = [nn.Conv(1, 1, (3,), padding=1, std=0, rng=0) for _ in range(convolutions)]
            for conv in self.convs:
                conv.weight.data += 1
            self.config = {"rank": 1, "in_channels": 1}

        def forward(self, x):
            for _ in range(2):
                x = ts.ops.double(x, size=(2 * x.shape[1],))
            for conv in self.convs:
                x = conv(x)
            return x

    net, most = Doubled(), 0
    for position in range(40, 44):
        x = ts.Tensor(np.ones((1, 20, 1), "float32"), requires_grad=True)
        net(x)[:, position].sum().backward()
        most = max(most, int((x.grad != 0).sum()))
    assert ts.summary(net, (1, 20, 1)).layers[-1].sees == (most,)


def test_a_mean_over_all_positions_sees_all():
    net = models.resnet_seg("resnet18", rank=2, in_channels=2, classes=2, head="deeplabv3")
    layers = {layer.name: layer for layer in ts.summary(net, (1, 40, 48, 2)).layers}
    assert layers["classifier.0.convs.4.1"].sees == (inf, inf) == layers["classifier.4"].sees
    assert layers["layer4.1.conv2"].sees == (483, 483)
    flat = models.resnet("resnet18", rank=2, in_channels=1, classes=5)
    assert ts.summary(flat, (2, 64, 64, 1)).layers[-1].sees == (inf, inf)


def test_what_resnet_18_costs():
    """torchvision's figures at 224 x 224: 11,689,512 parameters, 1.814 G multiply-adds."""
    net = models.resnet("resnet18", rank=2, in_channels=3, classes=1000)
    told = ts.summary(net, (1, 224, 224, 3))
    assert told.parameters == 11_689_512 == sum(layer.parameters for layer in told.layers)
    assert told.products == 1_814_073_344
    assert told.bytes == sum(4 * np.prod(layer.shape) for layer in told.layers)
    conv = told.layers[0]
    assert (conv.name, conv.kind, conv.shape, conv.parameters) == (
        "conv1", "Conv", (1, 112, 112, 64), 7 * 7 * 3 * 64)
    assert conv.products == 112 * 112 * 7 * 7 * 3 * 64


def test_volumes_and_all_ways_along_depth():
    flat = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3)
    shape = (1, 8, 16, 16, 1)
    deep, planar, mixed = (ts.summary(ts.inflate(flat, profile=name, depth_stride=1), shape)
                           for name in ("average", "planar", "mixed"))
    assert planar.layers[-1].sees == (1, 483, 483) and deep.layers[-1].sees[1:] == (483, 483)
    assert mixed.layers[-1].sees == deep.layers[-1].sees
    assert deep.products > 2.5 * planar.products and planar.parameters == sum(
        p.data.size for p in flat.parameters())


def test_the_table():
    net = nn.Sequential(nn.Conv(1, 2, (3, 3), padding=1, rng=0), nn.ReLU())
    assert str(ts.summary(net, (1, 8, 8, 1))) == (
        "layer  kind  answer   parameters  multiply-adds  MiB  sees\n"
        "0      Conv  1x8x8x2          20          0.0 M  0.0   3x3\n"
        "1      ReLU  1x8x8x2           0          0.0 M  0.0   3x3\n"
        "all                           20          0.0 M  0.0      ")


def test_a_network_is_as_it_was():
    net = models.resnet_seg("resnet18", rank=2, in_channels=1, classes=3).eval()
    before = net.state()
    ts.summary(net, (2, 16, 16, 1))
    assert all((before[name] == a).all() for name, a in net.state().items())
    assert not net.training and all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="C_in"):
        ts.summary(net, (1, 16, 16, 2))


class Twice(nn.Module):
    """A layer that is used twice, and one that is not its own."""

    def __init__(self):
        self.conv, self.norm = nn.Conv(1, 1, (3,), padding=1, rng=0), nn.BatchNorm(1)

    def forward(self, x):
        return ops.relu(self.norm(self.conv(self.conv(nn.ReLU()(x)))))


def test_a_trace_has_every_answer():
    net, x = Twice(), np.random.default_rng(0).standard_normal((2, 9, 1)).astype("float32")
    before = net.state()
    found = net.trace(x)
    assert list(found) == ["conv", "conv (2)", "norm", ""]
    with no_grad():
        once = net.conv(np.maximum(x, 0)).data
        np.testing.assert_array_equal(found["conv"], once)
        np.testing.assert_array_equal(found["conv (2)"], net.conv(once).data)
        np.testing.assert_array_equal(found[""], np.maximum(found["norm"], 0))
    assert net.training and all((before[k] == a).all() for k, a in net.state().items())
    assert "conv" not in nn.ReLU().trace(x)
    assert [layer.sees for layer in ts.summary(net, (1, 9, 1)).layers] == [(3,), (5,), (5,)]


def test_what_is_added_to_a_convolution_may_see_more():
    class Added(nn.Module):
        def __init__(self):
            self.wide = nn.Conv(1, 2, (9,), padding=4, rng=0)
            self.one = nn.Conv(1, 2, (1,), rng=1)

        def forward(self, x):
            return self.one(x, None, self.wide(x), relu=True)

    net = Added()
    assert ts.summary(net, (1, 40, 1)).layers[-1].sees == (9,)
    for parameter in net.parameters():
        parameter.data[...] = 1
    assert seen(net, 40, 1) == (9,)

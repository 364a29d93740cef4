"""Ways along depth other than a kernel of T x k x k: what each row of the table claims."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_inflate import awake, close, networks, normal, pair, same_on_every_slice, wide

import tinyseg as ts
from tinyseg import models, ops
from tinyseg.models import STRUCTURES, structures
from tinyseg.nn import BatchNorm, Conv, MaxPool, ReLU, Sequential
from tinyseg.profiles import PROFILES

WAYS = [name for name, row in PROFILES.items() if row.structure != "full"]
ALONG = [name for name in WAYS if STRUCTURES[name]]
LIKE_2D = [name for name in WAYS if PROFILES[name].exact]
BOTTLENECKS = "pointwise"  # of which some networks have none


def serves(name, net):
    """Whether a network has what a way is for."""
    return name != BOTTLENECKS or any(conv.reduces for _, conv in net.named(Conv))


def disturbed(net, by=0.5):
    """The network with every number that goes along depth changed, as training may."""
    rng = np.random.default_rng(1)
    for module in net.modules():
        if isinstance(module, structures.Along):
            for parameter in module.parameters():
                parameter.data += rng.uniform(-by, by, parameter.shape)
    return net


def square(channels=5):
    """Two blocks of square kernels, dilated and strided, in evaluation mode and float64."""
    rng = np.random.default_rng(0)
    return awake(Sequential(
        Conv(2, channels, (3, 3), padding=1, rng=rng), BatchNorm(channels), ReLU(),
        MaxPool((3, 3), 2, 1),
        Conv(channels, 4, (3, 3), padding=2, dilation=2, rng=rng), BatchNorm(4), ReLU(),
        Conv(4, 3, (5, 5), stride=2, padding=2, bias=False, rng=rng)))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(LIKE_2D), networks(), st.integers(1, 5), st.integers(1, 7),
       st.booleans())
def test_constant_depth(data, structure, network, slots, depth, train):
    net, strides = network
    assume(serves(structure, net))
    along = {name: data.draw(st.sampled_from(["plane", 1]), name)
             for name in ("depth_stride", "depth_dilation")}
    deep = ts.inflate(net, slots, structure, **along)
    if train:
        net, deep = net.copy().train(), deep.train()
    planes = depth
    for stride in strides if along["depth_stride"] == "plane" else []:
        planes = -(-planes // stride)
    assert same_on_every_slice(net, deep, normal(2, 7, 9, 2), depth, planes)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([name for name in WAYS if PROFILES[name].volumes]), networks(),
       st.integers(1, 5), st.integers(1, 7), st.sampled_from(["zero", "edge"]))
def test_any_volume(structure, network, slots, depth, padding):
    net, _ = network
    assume(serves(structure, net))
    deep = ts.inflate(net, slots, structure, depth_stride=1, depth_padding=padding)
    x = normal(2, depth, 7, 9, 2)
    y = deep(x).data
    for d in range(depth):
        assert close(y[:, d], net(x[:, d]).data)


@pytest.mark.parametrize("structure", [name for name in PROFILES if not PROFILES[name].volumes
                                       and name != BOTTLENECKS])
def test_the_table_claims_no_less_than_there_is(structure):
    net = square(9)
    deep = ts.inflate(net, 3, structure, depth_stride=1)
    x = normal(1, 6, 16, 16, 2)
    assert not close(deep(x).data[:, 2], net(x[:, 2]).data, 0.01)
    constant = same_on_every_slice(net, deep, x[:, 0], 6)
    assert constant == PROFILES[structure].exact


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(LIKE_2D), networks(), st.integers(1, 5), st.integers(1, 7),
       st.sampled_from(["plane", 1]))
def test_deflated_it_answers_alike_on_constant_depth_whatever_was_trained(
        structure, network, slots, depth, stride):
    net, strides = network
    assume(serves(structure, net))
    deep = disturbed(ts.inflate(net, slots, structure, depth_stride=stride))
    if structure in ("planar", BOTTLENECKS):
        for i, parameter in enumerate(deep.parameters()):
            parameter.data += 0.1 * normal(*parameter.shape, seed=i)
    planes = depth
    for each in strides if stride == "plane" else []:
        planes = -(-planes // each)
    back = ts.deflate(deep)
    assert same_on_every_slice(back, deep, normal(2, 7, 9, 2), depth, planes)
    assert back.state().keys() == net.state().keys()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([n for n in PROFILES if PROFILES[n].exact]), networks(), st.integers(1, 5))
def test_deflation_undoes_inflation(structure, network, slots):
    net, _ = network
    assume(serves(structure, net))
    back = ts.deflate(ts.inflate(net, slots, structure))
    assert all(close(a, net.state()[name], 1e-12) for name, a in back.state().items())
    assert repr(back) == repr(net)


def test_deflation_of_whole_networks_and_what_it_refuses():
    for options in ({"head": "unet", "decoder": (8, 6, 4)}, {"backbone": "resnet50"}):
        net = models.resnet_seg(**{"rank": 2, "in_channels": 2, "classes": 3, **options})
        deep = ts.inflate(net, (1, 3), "average", depth_stride=1)
        back = ts.deflate(deep)
        assert back.config == net.config and repr(back) == repr(net)
        assert models.build(back.config).state().keys() == net.state().keys()
        assert deep.config["rank"] == 3
    with pytest.raises(ValueError, match="^0: .*three planes"):
        ts.deflate(ts.inflate(square(), profile="acs"))
    with pytest.raises(ValueError, match="rank-3 convolutions, found 0 of another rank"):
        ts.deflate(square())
    with pytest.raises(ValueError, match="found no convolution"):
        ts.deflate(Sequential(ReLU()))


def test_tied_weights_stay_tied():
    net = awake(Sequential(*(Conv(2, 2, (3, 3), padding=1, bias=False, rng=i) for i in (0, 1))))
    net[1].weight = net[0].weight
    for structure in ("gaussian", "factored"):
        deep = ts.inflate(net, 3, structure)
        assert deep[1].weight is deep[0].weight and deep[1].along is deep[0].along
        back = ts.deflate(disturbed(deep))
        assert back[1].weight is back[0].weight
        assert same_on_every_slice(back, deep, normal(1, 16, 15, 2), 4)


CASES = [(3, 3, 1, 1, "edge"), (2, 3, 2, 1, "edge"), (3, 5, 1, 2, "zero"), (5, 3, 2, 2, "edge"),
         (4, 3, 1, 1, "zero")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slots, k, stride, dilation, padding", CASES)
@pytest.mark.parametrize("structure", ALONG)
def test_each_is_one_convolution_with_a_larger_kernel(structure, slots, k, stride, dilation,
                                                      padding, bias):
    """What is linear is the T x k x k convolution with a kernel that is written out here."""
    flat = awake(Sequential(Conv(3, 7, (k, k), stride=stride, padding=k // 2 * dilation,
                                 dilation=dilation, bias=bias, rng=0)))
    deep = disturbed(ts.inflate(flat, slots, structure,
                                depth_dilation="plane", depth_padding=padding))
    conv, x = deep[0], normal(2, 7, 9, 8, 3)
    answer = deep(x).data
    w2, along, before = conv.weight.data[0], conv.along, slots // 2
    kernel = np.zeros((slots, k, k, 3, 7))
    if structure == "factored":
        kernel = np.einsum("abio,tof->tabif", w2, along.weight.data[:, 0, 0])
    elif structure == "depthwise":
        kernel = np.einsum("abio,to->tabio", w2, along.weight.data)
    elif structure == "mixed":
        shares = np.exp(along.logits.data) / np.exp(along.logits.data).sum(axis=0)
        kernel = np.einsum("abio,to->tabio", w2, shares)
    elif structure.endswith("acs"):
        kernel, before = np.zeros((k, k, k, 3, 7)), k // 2
        shares = np.full((3, 7), 1 / 3)
        if structure == "acs":  # of 7 filters 3, 2 and 2
            shares = np.eye(3)[[0, 0, 0, 1, 1, 2, 2]].T
        elif structure == "soft-acs":
            shares = np.exp(along.logits.data) / np.exp(along.logits.data).sum(axis=0)
        for a, b in np.ndindex(k, k):
            for i, place in enumerate([(k // 2, a, b), (a, k // 2, b), (a, b, k // 2)]):
                kernel[place] += w2[a, b] * shares[i]
    else:  # what is not: gated by hand; of three channels none is shifted
        ends = "edge" if padding == "edge" else "constant"
        kernel, before = w2[None], 0
        if structure == "gate-shift":
            around = np.pad(x, ((0, 0), (slots // 2 * dilation, (slots - 1) * dilation
                                         - slots // 2 * dilation), *((0, 0),) * 3), ends)
            gates = [np.tanh(ops.conv(ts.Tensor(around[..., i : i + 1]),
                                      ts.Tensor(along.weight.data[i]),
                                      padding=(0, 1, 1), dilation=(dilation, 1, 1)).data)
                     for i in (0, 1)]
            let = [np.pad(g * x[..., i : i + 1], ((0, 0), (1, 1), *((0, 0),) * 3), ends)
                   for i, g in enumerate(gates)]
            x = np.concatenate([let[0][:, 2:] + (1 - gates[0]) * x[..., :1],
                                let[1][:, :-2] + (1 - gates[1]) * x[..., 1:2], x[..., 2:]], -1)
    after = (len(kernel) - 1 - before) * dilation
    y = ops.conv(ts.Tensor(np.pad(x, ((0, 0), (before * dilation, after), *((0, 0),) * 3),
                                  "edge" if padding == "edge" else "constant")),
                 ts.Tensor(kernel), conv.bias, stride=stride, dilation=dilation,
                 padding=(0, k // 2 * dilation, k // 2 * dilation))
    assert close(answer, y.data)


@pytest.mark.parametrize("ends, pads", [("edge", "edge"), ("zero", "constant")])
def test_an_eighth_of_the_channels_is_shifted_each_way(ends, pads):
    flat = awake(Sequential(Conv(17, 2, (3, 3), padding=1, rng=0)))
    deep, x = ts.inflate(flat, profile="shift", depth_padding=ends), normal(2, 5, 6, 7, 17)
    padded = np.pad(x, ((0, 0), (1, 1), *((0, 0),) * 3), pads)
    x[..., :2], x[..., 2:4] = padded[:, 2:, ..., :2], padded[:, :-2, ..., 2:4]
    y = deep(np.ascontiguousarray(padded[:, 1:-1])).data
    for d in range(5):
        assert close(y[:, d], flat(x[:, d]).data)


@pytest.mark.parametrize("structure", ALONG)
def test_gradients_of_what_goes_along_depth(structure):
    """Along a random direction, with a random cotangent, against central differences."""
    net, x = Sequential(Conv(9, 5, (3, 3), stride=2, padding=1, rng=0)).astype("float64"), None
    deep = disturbed(ts.inflate(net, 3, structure))
    x, g = ts.Tensor(normal(1, 4, 6, 5, 9), requires_grad=True), normal(1, 2, 3, 3, 5)
    inputs = [x, *deep.parameters()]
    assert len(inputs) == 3 + (structure not in ("shift", "acs", "mean-acs"))
    (deep(x) * g).sum().backward()
    for i, part in enumerate(inputs):
        direction, kept, h = normal(*part.shape, seed=i), part.data.copy(), 1e-6
        sides = []
        for sign in (1, -1):
            part.data = kept + sign * h * direction
            sides.append(float((deep(x).data * g).sum()))
        part.data = kept
        assert (part.grad * direction).sum() == pytest.approx(
            (sides[0] - sides[1]) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("head", ["linear", "unet"])
@pytest.mark.parametrize("structure", ["average", *WAYS])
def test_whole_networks_are_saved_and_built_again(structure, head, tmp_path, monkeypatch):
    for name, deep in (("resnet18", False), ("resnet50", True)):
        monkeypatch.setitem(models.BACKBONES, name, ((1, 1, 1, 0), deep))
    options = {"decoder": (8, 6)} if head == "unet" else {}
    net = models.resnet_seg("resnet50" if structure == BOTTLENECKS else "resnet18", rank=2,
                            in_channels=1, classes=2, head=head, **options)
    deep = ts.inflate(net, (1, 3), structure, depth_stride=1)
    deep = disturbed(deep, 0.01)
    assert deep.config["structure"] == PROFILES[structure].structure
    twin = models.build(deep.config)
    assert {n: a.shape for n, a in twin.state().items()} == {
        n: a.shape for n, a in deep.state().items()} and repr(twin) == repr(deep)
    ts.save(tmp_path / "net.npz", deep)
    x = normal(1, 4, 32, 32, 1).astype("float32")
    loaded = ts.load(tmp_path / "net.npz")
    assert (loaded.eval()(x).data == deep.eval()(x).data).all()
    names = [name for name, _ in deep.named_parameters() if ".along." not in name]
    assert names == [name for name, _ in net.named_parameters()]
    with ts.no_grad():  # what stands in a convolution's place has no batch-norm folded into it
        np.testing.assert_allclose(ts.infer.fold(deep)(x).data, deep(x).data, rtol=1e-3, atol=1e-4)


def test_slots_by_stage_say_where_a_structure_is():
    net = models.resnet_seg(rank=2, in_channels=1, classes=2)
    deep = ts.inflate(net, (1, 1, 1, 3, 3), "factored")
    assert {name.split(".")[0] for name, m in deep.named(structures.Along)} == {"layer3", "layer4"}
    planar = ts.inflate(net, 1, "factored")
    assert not [*planar.named(structures.Along)]


def test_pointwise_reaches_along_depth_where_bottlenecks_reduce():
    net = models.resnet_seg("resnet50", rank=2, in_channels=1, classes=2)
    for depth, slots in (("plane", 3), (5, 5)):
        deep = ts.inflate(net, depth, BOTTLENECKS)
        for name, conv in deep.named(Conv):
            first = name.endswith("conv1") and name != "conv1"
            assert conv.weight.shape[0] == (slots if first else 1)
    assert not any(max(conv.window.kernel) > 1 for _, conv in wide(net).items()
                   if conv.reduces)


@pytest.mark.parametrize("options, message", [
    ({"profile": "factor"}, "profile is 'factor'; expected one of average, .*factored"),
    ({"profile": "pointwise"}, "profile is 'pointwise', .* no bottleneck.*resnet50"),
    ({"profile": "acs"}, "^0: found the window.*keeps its size"),
    ({"profile": "factored", "slot": 4}, "^0: slot is 4"),
    ({"profile": "shift", "stem": "colour"}, "stem is 'colour' with the profile 'shift'"),
])
def test_wrong_arguments(options, message):
    net = pair()
    before = net.state()
    with pytest.raises(ValueError, match=message):
        ts.inflate(net, **options)
    assert all((a == before[name]).all() for name, a in net.state().items())


def test_a_network_is_built_of_the_structures_there_are():
    assert {row.structure for row in PROFILES.values()} == set(STRUCTURES)
    with pytest.raises(ValueError, match="structure is 'factor'; expected one of full, planar"):
        models.resnet_seg(rank=3, in_channels=1, classes=2, structure="factor")
    with pytest.raises(ValueError, match="rank 3"):
        models.resnet_seg(rank=2, in_channels=1, classes=2, structure="factored")

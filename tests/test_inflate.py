"""Inflation: sum(alpha) == 1 is exactness on constant depth, and nothing else changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyseg as ts
from tinyseg.models import Builder, Depth, Residual
from tinyseg.nn import BatchNorm, Conv, MaxPool, Module, ReLU, Sequential
from tinyseg.profiles import PROFILES, depth_profile, dirichlet, gaussian


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def awake(net, seed=0):
    """The network in float64 with random batch-norm parameters and statistics, in eval mode."""
    rng = np.random.default_rng(seed)
    net.astype("float64").load_state(
        {name: rng.uniform(0.5, 1.5, a.shape) if name.endswith(("weight", "var"))
         else rng.uniform(-0.5, 0.5, a.shape)
         for name, a in net.state().items() if a.ndim == 1}, strict=False)
    return net.eval()


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def same_on_every_slice(flat, deep, x, depth, planes=None):
    """Whether deep(x repeated along depth) is flat(x) in every slice."""
    with ts.no_grad():
        y, z = flat(x).data, deep(np.repeat(x[:, None], depth, axis=1)).data
    if y.ndim == 2:  # a classifier
        return close(z, y)
    return z.shape[1] == (planes or depth) and close(z, np.repeat(y[:, None], z.shape[1], axis=1))


def wide(net):
    """{name: convolution} of those with a kernel larger than one."""
    return {name: m for name, m in net.named(Conv) if max(m.weight.shape[:-2]) > 1}


@st.composite
def alphas(draw, slots):
    """Any numbers that sum to one, some of them negative."""
    some = draw(st.lists(st.floats(-1, 1), min_size=slots - 1, max_size=slots - 1))
    return np.array([*some, 1 - sum(some)])


@st.composite
def profiles(draw, slots, names):
    """The arguments of `inflate` that choose a profile, in every form that it takes."""
    kind = draw(st.sampled_from(["average", "zero", "array", "scale", "callable", "mapping"]))
    if kind == "average":
        return {"profile": "average"}
    if kind == "zero":
        place = st.sampled_from(["center", "first", *range(slots)])
        return {"profile": "zero", "slot": draw(place)}
    alpha = draw(alphas(slots))
    if kind == "mapping":
        return {"profile": {name: draw(alphas(slots)) for name in names}}
    return {"array": {"profile": alpha}, "scale": {"profile": "scale", "alpha": alpha},
            "callable": {"profile": lambda n: alpha}}[kind]


@st.composite
def networks(draw):
    """Two or three layers with any windows in the plane, residual blocks among them."""
    layers, channels, rng = [], 2, np.random.default_rng(draw(st.integers(0, 99)))
    strides = []
    for c in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        kind = draw(st.sampled_from(["conv", "pool", "residual"]))
        pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
        kernel, stride, dilation = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(pair), draw(pair)
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if kind == "pool":
            layers.append(MaxPool(kernel, stride, tuple((k // 2, k - 1 - k // 2) for k in kernel)))
        elif kind == "residual":
            block = Residual(Builder(2, Depth(), 1), channels, c, stride[0], dilation[0], c == 3)
            layers.append(block)
            channels, stride = block.c_out, (stride[0],) * 2
        else:
            padding = tuple((s - s // 2, s // 2 + draw(st.integers(0, 1))) for s in spans)
            mode = draw(st.sampled_from(["zero", "edge", ("zero", "edge")]))
            layers += [Conv(channels, c, kernel, stride=stride, padding=padding, dilation=dilation,
                            padding_mode=mode, bias=draw(st.booleans()), rng=rng),
                       BatchNorm(c), ReLU()]
            channels = c
        strides.append(stride[0])
    layers.append(Conv(channels, 3, (3, 2), padding=1, rng=rng))
    return awake(Sequential(*layers)), strides


@settings(max_examples=100, deadline=None)
@given(st.data(), networks(), st.integers(1, 5), st.integers(1, 7),
       st.tuples(st.integers(5, 11), st.integers(5, 11)), st.booleans())
def test_constant_depth(data, network, slots, depth, size, train):
    """Any profile, depth, stride and dilation, with batch statistics too."""
    net, strides = network
    along = {name: data.draw(st.sampled_from(["plane", 1]), name)
             for name in ("depth_stride", "depth_dilation")}
    deep = ts.inflate(net, slots, **data.draw(profiles(slots, wide(net))), **along)
    if train:
        net, deep = net.copy().train(), deep.train()
    planes = depth
    for stride in strides if along["depth_stride"] == "plane" else []:
        planes = -(-planes // stride)
    assert same_on_every_slice(net, deep, normal(2, *size, 2), depth, planes)


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(1, 5), st.integers(1, 7), st.sampled_from(["zero", "edge"]),
       st.sampled_from(["plane", 1]))
def test_any_volume_with_one_slot_at_depth_stride_one(network, slots, depth, padding, dilation):
    net, _ = network
    deep = ts.inflate(net, slots, "zero", depth_stride=1, depth_padding=padding,
                      depth_dilation=dilation)
    x = normal(2, depth, 7, 9, 2)
    for d in range(depth):
        assert close(deep(x).data[:, d], net(x[:, d]).data)


@pytest.mark.parametrize("profile, slot, zero", [
    ("zero", "center", 9), ("zero", "first", 7), ("zero", 2, 7), ("average", "center", 5),
    ([0.2, 0.5, 0.3], "center", 5), ([1, 1, -1], "center", 5),
])
def test_padding_decides(profile, slot, zero):
    """Exact slices out of nine behind two convolutions: all with the edge, `zero` with zeros."""
    rng = np.random.default_rng(0)
    net = Sequential(Conv(2, 6, (3, 3), padding=1, rng=rng), ReLU(),
                     Conv(6, 4, (3, 3), padding=1, rng=rng), ReLU()).astype("float64")
    x = normal(1, 7, 8, 2)
    flat = net(x).data
    for padding, expected in (("zero", zero), ("edge", 9)):
        deep = ts.inflate(net, 3, profile, slot=slot, depth_padding=padding)
        y = deep(np.repeat(x[:, None], 9, axis=1)).data
        errors = [np.linalg.norm(y[:, d] - flat) / np.linalg.norm(flat) for d in range(9)]
        assert sum(e < 1e-12 for e in errors) == expected
        assert all(e < 1e-12 or e > 1e-3 for e in errors)


@pytest.fixture(scope="module")
def resnet():
    return awake(ts.models.resnet_seg(rank=2, in_channels=2, classes=3))


@settings(max_examples=3, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["plane", 1]),
       st.sampled_from(["plane", 1]), st.tuples(st.integers(9, 25), st.integers(9, 25)))
def test_constant_depth_of_a_whole_network(resnet, data, slots, depth, stride, dilation, size):
    chosen = data.draw(profiles(slots, wide(resnet)))
    deep = ts.inflate(resnet, slots, **chosen, depth_stride=stride, depth_dilation=dilation)
    assert same_on_every_slice(resnet, deep, normal(1, *size, 2), depth)


@pytest.fixture(scope="module")
def unet():
    return awake(ts.models.resnet_seg(rank=2, in_channels=2, classes=3, head="unet",
                                      decoder=(9, 8, 7, 6, 5)))


EXACT = [name for name, row in PROFILES.items() if row.exact and row.structure != "pointwise"]
NUMBERS = [name for name, row in PROFILES.items() if row.structure == "full"]


@settings(max_examples=6, deadline=None)
@given(st.data(), st.sampled_from(EXACT), st.integers(1, 6),
       st.tuples(st.integers(9, 37), st.integers(9, 37)))
def test_constant_depth_of_an_encoder_and_its_decoder(unet, data, profile, depth, size):
    """Any halvings of depth, slots by stage, odd sizes: the decoder ends where the scan did."""
    halving, slots = st.integers(1, 2), st.integers(1, 3)
    stride = data.draw(st.one_of(st.just("plane"), st.just(1), st.tuples(*[halving] * 5)), "stride")
    five = data.draw(st.one_of(slots, st.tuples(slots, slots), st.tuples(*[slots] * 5)), "slots")
    deep = ts.inflate(unet, five, profile, depth_stride=stride)
    assert same_on_every_slice(unet, deep, normal(1, *size, 2), depth)


@pytest.mark.parametrize("output_stride, strides", [(8, (1, 2, 2)), (16, (2, 1, 1, 2))])
def test_constant_depth_of_dilated_trunks_with_a_stride_for_each_halving(output_stride, strides):
    net = awake(ts.models.resnet_seg(rank=2, in_channels=2, classes=3, output_stride=output_stride))
    deep = ts.inflate(net, (3, 1, 2, 1, 2), depth_stride=strides)
    assert same_on_every_slice(net, deep, normal(1, 9, 17, 2), 5)


def test_slots_and_strides_are_those_of_the_stage(unet):
    deep = ts.inflate(unet, (1, 2, 3, 4, 5), depth_stride=[1, 2, 1, 2, 1])
    slots = {"conv1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5, "segmentation_head": 1,
             **{f"decoder.blocks.{i}": n for i, n in enumerate((4, 3, 2, 1, 1))}}
    for name, conv in deep.named(Conv):
        flat = conv.window.kernel[1:] == (1, 1)
        expected = next(n for part, n in slots.items() if name.startswith(part))
        assert conv.window.kernel[0] == (1 if flat else expected), name
        halves = conv.window.stride[1] == 2 and name.startswith("layer3")
        assert conv.window.stride[0] == (2 if halves else 1), name
    assert deep.maxpool.window.kernel == (3, 3, 3) and deep.maxpool.window.stride == (2, 2, 2)
    assert deep.config["depth_stride"] == (1, 2, 1, 2, 1)
    with ts.no_grad():
        maps = deep.pyramid(ts.Tensor(normal(1, 7, 9, 18, 2)))
    assert [m.shape[1:-1] for m in maps] == [(7, 5, 9), (4, 3, 5), (4, 2, 3), (2, 1, 2), (2, 1, 1)]
    pool = ts.inflate(unet, 3, depth_stride=(2, 1, 2, 2, 2)).maxpool.window
    assert pool.kernel == (1, 3, 3) and pool.stride == (1, 2, 2)


@pytest.mark.parametrize("depth, slots", [((7, 3), 3), ((3, 2), 2), (2, 2), ((1, 3, 3, 3, 3), 1)])
def test_a_decoder_at_the_stems_size_has_no_more_slots_than_layer1(unet, depth, slots):
    deep = ts.inflate(unet, depth, depth_stride=1)
    assert {conv.window.kernel[0] for name, conv in deep.named(Conv)
            if name.startswith(("decoder.blocks.3", "decoder.blocks.4", "segm"))} == {slots}


def test_numbers_by_stage_are_for_networks_with_stages(unet):
    net = Sequential(Conv(1, 2, (3, 3), stride=2, padding=1, rng=0))
    for options, name in (({"depth_stride": (1, 2, 2)}, "depth_stride"),
                          ({"depth": (1, 1, 3, 3, 3)}, "depth")):
        with pytest.raises(ValueError, match=f"{name} is .* in none"):
            ts.inflate(net, **options)
    with pytest.raises(ValueError, match="depth_stride .* expected 5 numbers"):
        ts.inflate(unet, depth_stride=(1, 2, 2))
    trunk = ts.inflate(Sequential(unet.layer2, unet.layer3), depth_stride=1)  # parts keep theirs
    assert [conv.stage for _, conv in trunk.named(Conv)][::6] == [2, 3]


@pytest.mark.parametrize("options", [
    {"depth": (5, 2)},
    {"depth": (2, 1), "profile": lambda n: np.arange(1, n + 1) / (n * (n + 1) / 2)},
])
def test_stem_and_rest(resnet, options):
    stem, rest = options["depth"]
    deep = ts.inflate(resnet, **options)
    for name, conv in wide(resnet).items():
        slots = stem if name == "conv1" else rest
        assert dict(deep.named_parameters())[f"{name}.weight"].shape == (slots, *conv.weight.shape)
    assert same_on_every_slice(resnet, deep, normal(1, 9, 17, 2), 3)


@pytest.mark.parametrize("head, padding", [("linear", "zero"), ("fcn", "edge"),
                                           ("unet", "zero")])
def test_slices_of_any_volume_through_a_whole_network(resnet, unet, head, padding):
    net = unet if head == "unet" else resnet
    if head == "fcn":
        net = awake(ts.models.resnet_seg(rank=2, in_channels=2, classes=3, head="fcn"))
    deep = ts.inflate(net, 2, "zero", depth_stride=1, depth_padding=padding)
    x = normal(1, 4, 17, 11, 2)
    volume = deep(x).data
    assert close(volume[0], net(x[0]).data)
    if head == "linear":  # with pooling over depth it is not so
        deep.maxpool.window = Depth(pool_depth=3, depth_stride=1).pool(net.maxpool.window)
        assert not close(deep(x).data, volume, 1e-3)


def test_zero_padding_changes_a_whole_network(resnet):
    x = normal(1, 17, 9, 2)
    for profile, exact in (("zero", True), ("average", False)):
        deep = ts.inflate(resnet, 3, profile, depth_padding="zero")
        assert same_on_every_slice(resnet, deep, x, 5) == exact


@pytest.mark.parametrize("head", ["deeplabv3", "classify"])
def test_other_heads_on_constant_depth(head):
    options = {"rank": 2, "in_channels": 2, "classes": 3}
    net = awake(ts.models.resnet(**options) if head == "classify"
                else ts.models.resnet_seg(head=head, **options))
    deep = ts.inflate(net, 2)
    assert same_on_every_slice(net, deep, normal(1, 17, 33, 2), 3)
    if head == "classify":
        assert type(deep) is type(net) and deep.config == {**net.config, **deep.config, "rank": 3}
        assert {k: a.shape for k, a in ts.models.build(deep.config).state().items()} == {
            k: a.shape for k, a in deep.state().items()}


@pytest.mark.parametrize("alpha", [[0.5, 0.7, -0.2], [0.25, 0.75]])
def test_what_changes_and_what_does_not(resnet, alpha):
    before, windows = resnet.state(), {n: c.window for n, c in resnet.named(Conv)}
    deep = ts.inflate(resnet, len(alpha), alpha)
    inflated, names = 0, {f"{name}.weight" for name in wide(resnet)}
    assert list(deep.state()) == list(before)
    for name, w3 in deep.state().items():
        w2 = before[name]
        if name in names:
            inflated += 1
            for t, a in enumerate(alpha):
                np.testing.assert_array_equal(w3[t], a * w2)
            np.testing.assert_allclose(w3.sum(axis=0), w2, rtol=1e-12, atol=1e-12)
        else:
            np.testing.assert_array_equal(w3, w2[None] if w2.ndim > 1 else w2)
    assert inflated == 17  # the stem, and two in each of eight blocks
    assert all(len(conv.window.kernel) == 3 for _, conv in deep.named(Conv))

    arrays, others = resnet._arrays(), deep._arrays()
    assert all(not np.shares_memory(arrays[name], others[name]) for name in arrays)
    for array in others.values():
        array += 1
    assert {n: c.window for n, c in resnet.named(Conv)} == windows
    assert resnet.config["rank"] == 2 and len(resnet.maxpool.window.kernel) == 2
    assert all(np.array_equal(before[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("along, head", [
    ({}, {}), ({"depth": (5, 2), "depth_stride": 1, "depth_padding": "zero"}, {}),
    ({"depth": 2, "depth_dilation": "plane"}, {}), ({"depth_stride": (1, 1, 2, 2)}, {}),
    ({"depth": [1, 2, 2, 1, 2], "depth_stride": (1, 1, 2, 2, 1)},
     {"head": "unet", "decoder": (7, 5), "output_stride": 32}),
])
def test_it_is_the_network_of_rank_three(along, head):
    """inflate(rank 2) is resnet_seg(rank=3) with the same depth arguments and its state."""
    options = {"in_channels": 2, "classes": 3, "align_corners": False, "output_stride": 16,
               "dilate_first_block": False, **head}
    net = ts.models.resnet_seg(rank=2, **options).eval()
    deep = ts.inflate(net, **along)
    defaults = {"depth": 3, "depth_stride": "plane", "depth_dilation": 1, "depth_padding": "edge"}
    twin = ts.models.resnet_seg(rank=3, **options, **{**defaults, **along})
    assert twin.config == deep.config == ts.models.build(deep.config).config
    twin.load_state(deep.state())
    for kind in (Conv, MaxPool):
        assert [(n, m.window) for n, m in twin.named(kind)] == [
            (n, m.window) for n, m in deep.named(kind)]
    x = normal(1, 4, 17, 19, 2).astype("float32")
    np.testing.assert_array_equal(deep(x).data, twin.eval()(x).data)
    assert not deep.training and deep(x).dtype == "float32"


def test_windows_keep_their_plane_values():
    rng = np.random.default_rng(0)
    options = {"stride": (2, 3), "padding": ((1, 0), (2, 1)), "dilation": (3, 1),
               "padding_mode": ("edge", "zero")}
    net = Sequential(Conv(1, 2, (2, 5), **options, rng=rng), Conv(2, 2, (1, 1), stride=2, rng=rng),
                     MaxPool((3, 2), (2, 1), ((1, 1), (0, 1))), Conv(2, 2, (4, 1), rng=rng))
    flat = [m.window for _, m in net.named((Conv, MaxPool))]
    for stride, dilation in (("plane", "plane"), (1, 1)):
        deep = ts.inflate(net, (4, 3), depth_stride=stride, depth_dilation=dilation)
        found = [m.window for _, m in deep.named((Conv, MaxPool))]
        for plane, window in zip(flat, found, strict=True):
            for field in ("kernel", "stride", "padding", "dilation", "edge"):
                assert getattr(window, field)[1:] == getattr(plane, field), field
            assert window.stride[0] == (plane.stride[0] if stride == "plane" else 1)
            assert window.dilation[0] == (plane.dilation[0] if stride == "plane" else 1)
        assert [w.kernel[0] for w in found] == [4, 1, 3 if stride == "plane" else 1, 3]
        assert [w.edge[0] for w in found] == [True, True, False, True]


def test_the_network_may_be_one_convolution():
    conv = Conv(2, 3, (3, 3), padding=1, rng=np.random.default_rng(0)).astype("float64")
    deep = ts.inflate(conv, 4)
    assert deep.weight.shape == (4, 3, 3, 2, 3) and conv.weight.shape == (3, 3, 2, 3)
    assert same_on_every_slice(conv, deep, normal(1, 5, 6, 2), 3)


def test_a_frozen_layer_stays_frozen():
    net = Sequential(Conv(2, 3, (3, 3), rng=np.random.default_rng(0)), BatchNorm(3))
    for p in net.parameters()[::2]:
        p.requires_grad = False
    assert [p.requires_grad for p in ts.inflate(net).parameters()] == [False, True, False, True]
    deep = ts.inflate(net.unfreeze().freeze("1"))
    assert [p.requires_grad for p in deep.parameters()] == [True, True, False, False]
    assert deep[1].frozen


def test_a_layer_that_stands_twice_is_inflated_once():
    conv = Conv(2, 2, (3, 3), padding=1, rng=np.random.default_rng(0))
    net = Sequential(conv, ReLU(), conv).astype("float64")
    assert same_on_every_slice(net, ts.inflate(net), normal(1, 5, 6, 2), 4)


def tied():
    """A stem, two layers between, and one more with the stem's kernel."""
    rng = np.random.default_rng(0)
    net = Sequential(*(Conv(2, 2, k, padding=1, rng=rng) for k in [(3, 3), (3, 1), (3, 1), (3, 3)]))
    net[2].weight, net[3].weight = net[1].weight, net[0].weight
    return net.astype("float64")


@pytest.mark.parametrize("profile", [*NUMBERS, {"0": [0.1, 0.2, 0.3, 0.4], "1": [0.5, 0.5]}])
def test_tied_weights_stay_tied(profile):
    net = tied()
    net[0].weight.requires_grad = False
    deep = ts.inflate(net, (4, 2), profile, seed=3)
    assert deep[3].weight is deep[0].weight and deep[2].weight is deep[1].weight
    assert deep[0].weight.shape == (4, 3, 3, 2, 2) and deep[1].weight.shape == (2, 3, 1, 2, 2)
    assert [layer.window.kernel[0] for layer in deep] == [4, 2, 2, 4]
    assert list(deep.state()) == list(net.state())
    assert [p.requires_grad for p in deep.parameters()] == [p.requires_grad
                                                            for p in net.parameters()]
    if not isinstance(profile, str) or PROFILES[profile].exact:
        assert same_on_every_slice(net, deep, normal(1, 5, 6, 2), 3)
    assert net[0].weight.shape == (3, 3, 2, 2)


def test_a_mapping_names_the_first_of_tied_convolutions():
    with pytest.raises(ValueError, match=r"must name the convolutions \['0', '1'\]"):
        ts.inflate(tied(), 2, {str(i): [0.5, 0.5] for i in range(4)})


def test_gradients_of_the_original_are_left_behind():
    net = tied()
    net(normal(1, 5, 6, 2)).sum().backward()
    assert all(p.grad is None for p in (ts.inflate(net)[0].weight, ts.inflate(net)[1].weight))
    assert net[0].weight.grad.shape == net[0].weight.shape


class Branches(Module):
    """Convolutions in a tuple, and a `config` that is not what rebuilds a network."""

    def __init__(self):
        self.branches = (Conv(2, 3, (3, 3), padding=1, rng=0), MaxPool((3, 3), 1, 1))
        self.config = ("lr", 0.1)

    def forward(self, x):
        for branch in self.branches:
            x = branch(x)
        return x


def test_modules_in_a_tuple_are_inflated_and_another_config_stays():
    net = Branches().astype("float64")
    deep = ts.inflate(net)
    assert deep.branches[0].weight.shape == (3, 3, 3, 2, 3) and deep.config == net.config
    assert same_on_every_slice(net, deep, normal(1, 5, 6, 2), 4)


def test_integers_of_numpy_are_integers():
    net = pair()
    options = {"depth": (3, 2), "profile": "zero", "slot": 1, "depth_dilation": 1}
    deep = ts.inflate(net, (np.int64(3), np.uint8(2)), "zero", slot=np.int64(1),
                      depth_dilation=np.int32(1))
    expected = ts.inflate(net, **options)
    assert all((a == deep.state()[name]).all() for name, a in expected.state().items())
    assert [m.window for _, m in deep.named(Conv)] == [m.window for _, m in expected.named(Conv)]


@given(st.integers(1, 9))
def test_profiles_by_name(slots):
    np.testing.assert_allclose(depth_profile("average", slots), [1 / slots] * slots)
    for slot, at in [("center", slots // 2), ("first", 0), *((i, i) for i in range(slots))]:
        assert depth_profile("zero", slots, slot).tolist() == [i == at for i in range(slots)]
    assert depth_profile(np.ones, 1).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(NUMBERS), networks(), st.integers(2, 5),
       st.integers(1, 5))
def test_every_profile_is_what_it_claims(data, name, network, slots, depth):
    """Exact: it sums to one, and the network agrees on constant depth; the others do neither."""
    net, _ = network
    slot = data.draw(st.sampled_from(["center", "first", *range(slots)]), "slot")
    alpha = depth_profile(name, slots, slot)
    assert alpha.shape == (slots,) and PROFILES[name].formula and PROFILES[name].source
    deep = ts.inflate(net, slots, name, slot=slot, depth_stride=1)
    sums = [close(conv.weight.data.sum(axis=0), wide(net)[layer].weight.data, 1e-12)
            for layer, conv in deep.named(Conv) if layer in wide(net)]
    x = normal(1, 7, 9, 2)
    exact = same_on_every_slice(net, deep, x, depth)
    if PROFILES[name].exact:
        assert abs(alpha.sum() - 1) < 1e-12 and all(sums) and exact
    else:  # where no ReLU lets anything through, the last bias alone is seen, and any two agree
        alive = np.ptp(net(x).data, axis=(0, 1, 2)).any()
        assert not any(sums) and not (exact and alive)


@given(st.integers(1, 9), st.data())
def test_formulas(slots, data):
    c = data.draw(st.integers(0, slots - 1))
    t = np.arange(slots)
    for name, wanted in (
        ("negative", [(2 * slots - 1) / slots if i == c else -1 / slots for i in t]),
        ("triangular", (slots - abs(t - c)) / sum(slots - abs(i - c) for i in t)),
        ("replicate", [1] * slots),
    ):
        np.testing.assert_allclose(depth_profile(name, slots, c), wanted, atol=1e-12)
    ratio = depth_profile("gaussian", slots, c)  # against its value at c: sigma is a quarter of T
    np.testing.assert_allclose(np.log(ratio / ratio[c]), -8 * (t - c) ** 2 / slots**2, atol=1e-9)
    for name in ("average", "zero", "negative", "triangular", "gaussian", "replicate"):
        alpha = depth_profile(name, 2 * c + 1)
        np.testing.assert_allclose(alpha, alpha[::-1], atol=1e-15)


@given(st.integers(1, 9), st.floats(0.2, 9))
def test_gaussian_lies_between_zero_and_average(slots, sigma):
    for s, limit in ((0.05, "zero"), (1e6, "average")):
        np.testing.assert_allclose(depth_profile(gaussian(s), slots), depth_profile(limit, slots),
                                   atol=1e-9)
    alpha = depth_profile(gaussian(sigma), slots)
    wanted = np.exp(-((np.arange(slots) - slots // 2) ** 2) / (2 * sigma**2))
    np.testing.assert_allclose(alpha / alpha[slots // 2], wanted, rtol=1e-9)
    assert 1 / slots - 1e-12 <= alpha.max() <= 1


def slot_ratios(deep, net):
    """{layer: alpha} as found in the kernels."""
    flat = {name: conv.weight.data for name, conv in wide(net).items()}
    return {name: [float(np.vdot(w, flat[name]) / np.vdot(flat[name], flat[name]))
                   for w in conv.weight.data]
            for name, conv in deep.named(Conv) if name in flat}


@pytest.mark.parametrize("profile", [
    lambda seed: {"profile": dirichlet(seed)},
    lambda seed: {"profile": "dirichlet", "seed": seed},
])
def test_dirichlet_differs_by_layer_and_repeats_by_seed(profile):
    rng = np.random.default_rng(0)
    net = Sequential(*[Conv(2, 2, (3, 3), padding=1, rng=rng) for _ in range(4)]).astype("float64")
    one, again, other = (slot_ratios(ts.inflate(net, 3, **profile(seed)), net)
                         for seed in (1, 1, 2))
    assert one == again and len(one) == 4
    rows = [*one.values(), *other.values()]
    assert len({tuple(np.round(row, 9)) for row in rows}) == 8
    assert all(min(row) > 0 and abs(sum(row) - 1) < 1e-12 for row in rows)
    assert same_on_every_slice(net, ts.inflate(net, 3, **profile(3)), normal(1, 6, 7, 2), 3)
    even, uneven = (dirichlet(0, c)(5) for c in (1e6, 1e-3))  # the concentration
    assert np.ptp(even) < 0.01 and uneven.max() > 0.99


def test_noise_is_seeded_and_as_large_as_it_says():
    net = Sequential(Conv(20, 30, (3, 3), rng=np.random.default_rng(0))).astype("float64")
    w2 = net.state()["0.weight"]
    one, again, other = (ts.inflate(net, 3, "noise", seed=s).state()["0.weight"] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one[1], w2)
    for t in (0, 2):
        assert abs(one[t].std() / w2.std() - 0.1) < 0.005 and not (one[t] == other[t]).any()
        assert abs(np.corrcoef(one[t].ravel(), w2.ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(one[0].ravel(), one[2].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("head", ["linear", "fcn"])
def test_colours_become_neighbouring_slices(head):
    """Slice d sees d-1, d, d+1 as the three colours, the border repeated."""
    net = awake(ts.models.resnet_seg(rank=2, in_channels=3, classes=2, head=head))
    deep = ts.inflate(net, 3, "zero", depth_stride=1, stem="colour")
    assert deep.config["in_channels"] == 1 and deep.conv1.weight.shape == (3, 7, 7, 1, 64)
    x = normal(1, 5, 17, 11, 1)
    y = deep(x).data
    for d in range(5):
        colours = [x[:, min(max(d + i, 0), 4)] for i in (-1, 0, 1)]
        assert close(y[:, d], net(np.concatenate(colours, axis=-1)).data)
    swapped = np.concatenate([x[:, 3], x[:, 2], x[:, 1]], axis=-1)
    assert not close(y[:, 2], net(swapped).data, 1e-3)
    twin = ts.models.build(deep.config)
    assert {k: a.shape for k, a in twin.state().items()} == {
        k: a.shape for k, a in deep.state().items()}


@pytest.mark.parametrize("options, message", [
    ({"stem": "colour"}, "^0: .*3 and 1"), ({"stem": "color"}, "stem is 'color'"),
])
def test_wrong_stems(options, message):
    with pytest.raises(ValueError, match=message):
        ts.inflate(pair(), **options)


def pair():
    rng = np.random.default_rng(0)
    return Sequential(Conv(1, 2, (3, 3), rng=rng), Conv(2, 2, (1, 1), rng=rng),
                      Sequential(Conv(2, 2, (1, 3), rng=rng)))


THIRD = [1 / 3] * 3


@pytest.mark.parametrize("options, message", [
    ({"profile": [0.5, 0.5, 0.1]}, "^0: .*sum 1.1"),
    ({"profile": [0.5, 0.5]}, r"^0: .*shape \(2,\).*\(3,\)"),
    ({"profile": [np.nan, 0.5, 0.5]}, "^0: .*nan"),
    ({"depth": (3, 2), "profile": THIRD}, r"^2\.0: .*\(3,\).*\(2,\)"),
    ({"profile": lambda n: np.ones(n)}, "^0: .*sum 3"),
    ({"profile": "cubic"}, "cubic.*average, zero, negative.*scale"),
    ({"profile": "scale"}, "scale needs alpha"),
    ({"profile": "scale", "alpha": [1, 1, 1]}, "^0: .*sum 3"),
    ({"alpha": [0.2, 0.5, 0.3]}, "alpha"),  # for profile scale only
    ({"profile": "zero", "alpha": [0.2, 0.5, 0.3]}, "alpha"),
    ({"profile": {"0": THIRD}}, r"2\.0"),
    ({"profile": {"0": THIRD, "2.0": THIRD, "1": [1]}}, "'1'"),
    ({"profile": {"0": THIRD, "2.0": [0.5, 0.5]}}, r"^2\.0: .*shape \(2,\)"),
    ({"profile": {}}, r"2\.0"),
    ({"profile": "zero", "slot": 3}, "slot is 3.*0 to 2"),
    ({"profile": "zero", "slot": -1}, "slot is -1"),
    ({"profile": "zero", "slot": "last"}, "slot is 'last'"),
    ({"profile": "zero", "slot": 2, "depth": (3, 2)}, r"^2\.0: slot is 2.*0 to 1"),
    ({"profile": "zero", "slot": 1.0}, "^0: slot is 1.0"), ({"slot": None}, "^0: slot is None"),
    ({"profile": "zero", "slot": True}, "^0: slot is True"),
    ({"profile": "dirichlet", "slot": 3}, "^0: slot is 3"),
    ({"profile": THIRD, "slot": 99}, "^0: slot is 99; it goes with a profile's name"),
    ({"profile": "scale", "alpha": THIRD, "slot": "first"}, "^0: slot is 'first'; it goes"),
    ({"profile": gaussian(1), "slot": 0}, "^0: slot is 0; it goes"),
    ({"depth": True}, "depth is True"), ({"depth": (3, False)}, "depth is"),
    ({"depth_dilation": True}, "depth_dilation is True"), ({"depth_stride": 1.0}, "depth_stride"),
    ({"depth": 0}, "depth is 0"), ({"depth": (3, 3, 3)}, "depth is"), ({"depth": 1.5}, "depth is"),
    ({"depth_stride": (1, 3, 1)}, "depth_stride"), ({"depth_stride": (2, 2)}, "depth_stride"),
    ({"depth_stride": (1, 2, True)}, "depth_stride"), ({"depth": (1, 1, 3, 3, 0)}, "depth is"),
    ({"depth_stride": 2}, "depth_stride"), ({"depth_dilation": 0}, "depth_dilation"),
    ({"depth_padding": "wrap"}, "depth_padding"),
])
def test_wrong_arguments(options, message):
    net = pair()
    before = net.state()
    with pytest.raises(ValueError, match=message):
        ts.inflate(net, **options)
    assert all(np.array_equal(before[name], a) for name, a in net.state().items())


def test_wrong_networks():
    with pytest.raises(ValueError, match="0 of another rank"):
        ts.inflate(ts.inflate(pair()))
    with pytest.raises(ValueError, match="another rank"):
        ts.inflate(Sequential(Conv(1, 2, (3,), rng=np.random.default_rng(0))))
    with pytest.raises(ValueError, match="no convolution"):
        ts.inflate(Sequential(ReLU(), BatchNorm(3)))

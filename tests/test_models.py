"""Residual networks: sizes and names from the literature, shapes, and equality of ranks."""

import itertools

import numpy as np
import pytest

import tinyseg as ts
from tinyseg import models

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3),
          "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
# arrays in the state; parameters: 2D with 21 and with 3 classes (RGB), 3D with one channel, three
# classes and three slots in every kernel, and with seven in the stem
COUNTS = {
    "resnet18": (102, 11_187_285, 11_178_051, 33_148_995, 33_161_539),
    "resnet34": (182, 21_295_445, 21_286_211, 63_458_627, 63_471_171),
    "resnet50": (267, 23_551_061, 23_514_179, 46_148_675, 46_161_219),
    "resnet101": (522, 42_543_189, 42_506_307, 85_194_819, 85_207_363),
}


class Zeros:
    """A generator that takes no time."""

    def __init__(self, seed):
        pass

    def standard_normal(self, shape, dtype):
        return np.zeros(shape, dtype)


@pytest.mark.parametrize("backbone", COUNTS)
def test_counts(backbone, monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", Zeros)
    arrays, *expected = COUNTS[backbone]
    options = [{"rank": 2, "in_channels": 3, "classes": 21},
               {"rank": 2, "in_channels": 3, "classes": 3},
               {"rank": 3, "in_channels": 1, "classes": 3, "depth": 3},
               {"rank": 3, "in_channels": 1, "classes": 3, "depth": (7, 3)}]
    for arguments, count in zip(options, expected, strict=True):
        net = models.resnet_seg(backbone, **arguments)
        assert sum(p.data.size for p in net.parameters()) == count
        assert len(net.state()) == arrays


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("maker", [models.resnet_seg, models.resnet])
def test_width(backbone, maker, tmp_path):
    """Every layer's channels in proportion; built again from its config and from a file; inflated,
    it is the twin of that width."""
    options = {"rank": 2, "in_channels": 3, "classes": 5}
    narrow, full = maker(backbone, width=8, **options), maker(backbone, width=64, **options)
    assert full.config == maker(backbone, **options).config and "width" not in full.config
    for (name, few), (same, many) in zip(narrow.state().items(), full.state().items(),
                                         strict=True):
        scaled = [8 * a == b or a == b and a in (1, 3, 5, 7)
                  for a, b in zip(few.shape, many.shape, strict=True)]
        assert name == same and all(scaled), name
    assert narrow.channels == tuple(c // 8 for c in full.channels)
    ts.save(tmp_path / "narrow.npz", narrow)
    again = ts.load(tmp_path / "narrow.npz")
    assert again.config == narrow.config == models.build(narrow.config).config
    deep = ts.inflate(narrow, depth=3)
    assert [p.shape for p in deep.parameters()] == [p.shape for p in maker(
        backbone, width=8, **options | {"rank": 3}, **{key: deep.config[key] for key in (
            "depth", "depth_stride", "depth_dilation", "depth_padding")}).parameters()]
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"width is {wrong}; expected a positive int"):
            maker(backbone, width=wrong, **options)


def trunk_names(backbone):
    """torchvision's names, in its order, without num_batches_tracked."""
    norm = ("weight", "bias", "running_mean", "running_var")
    convs = 2 if backbone in ("resnet18", "resnet34") else 3
    yield "conv1.weight"
    yield from (f"bn1.{part}" for part in norm)
    for layer, count in enumerate(BLOCKS[backbone], start=1):
        for block in range(count):
            prefix = f"layer{layer}.{block}"
            for i in range(1, convs + 1):
                yield f"{prefix}.conv{i}.weight"
                yield from (f"{prefix}.bn{i}.{part}" for part in norm)
            if block == 0 and (layer > 1 or convs == 3):
                yield f"{prefix}.downsample.0.weight"
                yield from (f"{prefix}.downsample.1.{part}" for part in norm)


@pytest.mark.parametrize("backbone, rank", list(itertools.product(BLOCKS, (1, 2))))
def test_names(backbone, rank, monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", Zeros)
    options = {"rank": rank, "in_channels": 1, "classes": 2}
    expected = [*trunk_names(backbone), "fc.weight", "fc.bias"]
    for make in (models.resnet_seg, models.resnet):
        net = make(backbone, **options)
        assert list(net.state()) == expected
        assert [name for name, _ in net.named_parameters()] == [
            name for name in expected if "running" not in name]


def test_names_of_the_heads():
    options = {"rank": 2, "in_channels": 1, "classes": 2}
    norm = ("weight", "bias", "running_mean", "running_var")

    def head(kind):
        state = models.resnet_seg(head=kind, **options).state()
        return [name.removeprefix("classifier.") for name in state if name.startswith("classifier")]

    fcn = ["0.weight", *(f"1.{p}" for p in norm), "4.weight", "4.bias"]
    assert head("fcn") == fcn
    pyramid = []
    for branch, conv in enumerate((0, 0, 0, 0, 1)):
        pyramid += [f"0.convs.{branch}.{conv}.weight",
                    *(f"0.convs.{branch}.{conv + 1}.{p}" for p in norm)]
    pyramid += ["0.project.0.weight", *(f"0.project.1.{p}" for p in norm)]
    assert head("deeplabv3") == [*pyramid, "1.weight", *(f"2.{p}" for p in norm),
                                 "4.weight", "4.bias"]


def test_names_of_the_decoder():
    """Those of segmentation_models_pytorch's Unet, behind the trunk's; head_names are theirs."""
    net = models.resnet_seg(rank=1, in_channels=1, classes=2, head="unet", decoder=(6, 4, 2))
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = list(trunk_names("resnet18"))
    for i in range(3):
        for conv in ("conv1", "conv2"):
            expected += [f"decoder.blocks.{i}.{conv}.0.weight",
                         *(f"decoder.blocks.{i}.{conv}.1.{part}" for part in norm)]
    expected += ["segmentation_head.0.weight", "segmentation_head.0.bias"]
    assert list(net.state()) == expected and net.head_names == ("decoder", "segmentation_head")
    group = models.resnet_seg(rank=1, in_channels=1, classes=2, head="unet", decoder=(6, 4, 2),
                              norm="group")
    assert list(group.state()) == [n for n in expected
                                   if not (n.startswith("decoder") and "running" in n)]


@pytest.mark.parametrize("head", models.HEADS)
def test_head_names_are_those_of_what_is_not_the_trunk(head):
    net = models.resnet_seg(rank=1, in_channels=1, classes=2, head=head)
    trunk = set(trunk_names("resnet18"))
    assert {name.partition(".")[0] for name in net.state() if name not in trunk} == set(
        net.head_names)
    assert models.HEADS[head].last == list(net.state())[-1]
    assert models.resnet(rank=1, in_channels=1, classes=2).head_names == ("fc",)


@pytest.mark.parametrize("backbone, count", [("resnet18", 14_328_209), ("resnet34", 24_436_369)])
def test_counts_of_the_encoder_and_decoder(backbone, count, monkeypatch):
    """segmentation_models_pytorch's default Unet: three channels, one class, five blocks."""
    monkeypatch.setattr(np.random, "default_rng", Zeros)
    net = models.resnet_seg(backbone, rank=2, in_channels=3, classes=1, head="unet")
    assert sum(p.data.size for p in net.parameters()) == count


@pytest.mark.parametrize("size, decoder", [
    ((61,), (8,)), ((33, 50), (8, 7)), ((1, 64), (8, 7, 6)), ((17, 26, 9), (8, 7, 6, 5)),
    ((9, 33, 18), (8, 7, 6, 5, 4)),
])
def test_shapes_of_the_decoder(size, decoder):
    net = models.resnet_seg(rank=len(size), in_channels=2, classes=3, head="unet", decoder=decoder,
                            depth=1 if len(size) == 3 else "plane").eval()
    x = ts.Tensor(np.random.default_rng(0).standard_normal((2, *size, 2)).astype("float32"))
    with ts.no_grad():
        maps, logits = net.pyramid(x), net(x)
        decoded = net.decoder(x, *maps)
    for stride, stage, channels in zip((2, 4, 8, 16, 32), maps, net.channels, strict=True):
        assert stage.shape == (2, *(-(-n // stride) for n in size), channels)
    assert decoded.shape == (2, *(-(-n // 2 ** (5 - len(decoder))) for n in size), decoder[-1])
    assert logits.shape == (2, *size, 3) and np.ptp(logits.data) > 0
    np.testing.assert_array_equal(net.features(x).data, maps[-1].data)


def test_kernels_of_rank_three():
    def kernels(**depth):
        net = models.resnet_seg("resnet50", rank=3, in_channels=1, classes=2, **depth)
        return {name: conv.window for name, conv in net.named(ts.nn.Conv)}, net.maxpool.window

    plane, pool = kernels()
    for name, window in plane.items():  # isotropic: depth does what the plane does
        for field in (window.kernel, window.stride, window.dilation, window.padding):
            assert field[0] == field[1] == field[2], name
    assert plane["conv1"].kernel == (7, 7, 7) and pool.kernel == (3, 3, 3)
    assert plane["layer3.0.conv2"].dilation == (2, 2, 2)
    assert plane["layer4.0.conv2"].dilation == (4, 4, 4)
    thin, pool = kernels(depth=(5, 2), depth_stride=1, depth_dilation=1, depth_padding="edge")
    assert pool.kernel == (1, 3, 3) and pool.stride == (1, 2, 2)
    for name, window in thin.items():
        flat = window.kernel[1:] == (1, 1)
        assert window.kernel[0] == (5 if name == "conv1" else 1 if flat else 2), name
        assert window.stride[0] == window.dilation[0] == 1 and window.edge == (True, False, False)
        assert window.stride[1:] == plane[name].stride[1:]
        assert window.dilation[1:] == plane[name].dilation[1:]
        assert sum(window.padding[0]) == window.kernel[0] - 1  # the depth stays
    assert kernels(depth=1, pool_depth=3)[1].kernel == (3, 3, 3)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(61,), (33, 50), (17, 26, 9)])
def test_shapes(size, output_stride):
    net = models.resnet_seg(rank=len(size), in_channels=2, classes=3, output_stride=output_stride,
                            depth=1 if len(size) == 3 else "plane").eval()
    x = np.random.default_rng(0).standard_normal((2, *size, 2)).astype("float32")
    with ts.no_grad():
        features = net.features(ts.Tensor(x))
        assert features.shape == (2, *(-(-n // output_stride) for n in size), 512)
        logits = net(x)
    assert logits.shape == (2, *size, 3) and logits.dtype == "float32"
    assert np.isfinite(logits.data).all() and np.ptp(logits.data) > 0


@pytest.mark.parametrize("size", [(61,), (33, 50)])
def test_shapes_of_other_networks(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 1)).astype("float32")
    options = {"rank": len(size), "in_channels": 1, "classes": 5}
    with ts.no_grad():
        assert models.resnet(**options).eval()(x).shape == (2, 5)
        for head in ("fcn", "deeplabv3"):
            assert models.resnet_seg(head=head, **options).eval()(x).shape == (2, *size, 5)


def volume_of(net, **options):
    """The rank-3 network with one slot in depth and the weights of a rank-2 one."""
    config = {k: v for k, v in net.config.items() if k != "model" and "depth" not in k}
    deep = models.resnet_seg(**{**config, "rank": 3}, depth=1, **options).astype("float64")
    state = {name: a[None] if a.ndim > 1 else a for name, a in net.state().items()}
    deep.load_state(state)
    return deep.train() if net.training else deep.eval()


@pytest.mark.parametrize("head", ["linear", "deeplabv3"])
def test_rank_two_is_rank_three_at_depth_one(head):
    flat = models.resnet_seg(rank=2, in_channels=2, classes=3, head=head).astype("float64")
    x = np.random.default_rng(1).standard_normal((3, 17, 25, 2))
    for net in (flat.train(), flat.eval()):
        deep = volume_of(net)
        np.testing.assert_allclose(deep(x[:, None]).data[:, 0], net(x).data, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head", ["linear", "fcn"])
def test_a_volume_at_depth_stride_one_is_its_slices(head):
    flat = models.resnet_seg(rank=2, in_channels=2, classes=3, head=head).astype("float64").eval()
    x = np.random.default_rng(1).standard_normal((2, 5, 17, 11, 2))
    y = volume_of(flat, depth_stride=1)(x).data
    expected = flat(x.reshape(10, 17, 11, 2)).data.reshape(2, 5, 17, 11, 3)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-10)


def test_seeds():
    def state(seed):
        return models.resnet_seg(rank=2, in_channels=1, classes=2, seed=seed).state()

    one, again, other = state(1), state(1), state(2)
    for name, array in one.items():
        np.testing.assert_array_equal(array, again[name])
        assert np.array_equal(array, other[name]) == (array.ndim == 1), name
    assert all(a.dtype == np.float32 for a in one.values())


def test_the_start():
    net = models.resnet_seg(rank=2, in_channels=3, classes=21, seed=5)
    for name, array in net.state().items():
        if name == "fc.weight":
            assert array.std() == pytest.approx(0.01, rel=0.05)
        elif array.ndim > 1:  # He's rule: 2 / (C_out k²)
            variance = 2 / (array.shape[-1] * array.shape[0] * array.shape[1])
            assert array.var() == pytest.approx(variance, rel=0.1), name
        else:
            value = 1 if name.endswith(("var", "weight")) else 0
            assert (array == value).all(), name


def test_a_copy_is_independent():
    net = models.resnet_seg(rank=2, in_channels=1, classes=2)
    other = net.copy()
    for (name, a), (same, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and not np.shares_memory(a.data, b.data)
        np.testing.assert_array_equal(a.data, b.data)
    assert other.config == net.config


def test_heads_start_near_zero():
    for make in (models.resnet, models.resnet_seg):
        weight = make(rank=2, in_channels=1, classes=20).fc.weight.data
        assert weight.std() == pytest.approx(0.01, rel=0.05) and weight.dtype == "float32"


@pytest.mark.parametrize("make, options", [
    (models.resnet_seg, {"rank": 2, "output_stride": 16, "head": "fcn", "align_corners": False,
                         "dilate_first_block": False}),
    (models.resnet_seg, {"rank": 3, "depth": (1, 2, 1, 2, 1), "depth_stride": (1, 2, 1)}),
    (models.resnet_seg, {"rank": 2, "head": "unet", "decoder": (9, 5), "norm": "group"}),
    (models.resnet_seg, {"rank": 3, "depth": (5, 2), "depth_stride": 1, "depth_dilation": 1,
                         "depth_padding": "edge", "pool_depth": 3}),
    (models.resnet, {"rank": 3, "depth": 1, "depth_padding": "edge"}),
    (models.resnet, {"rank": 1, "backbone": "resnet50"}),
])
def test_a_config_rebuilds_the_network(make, options):
    net = make(in_channels=2, classes=3, seed=4, **options)
    again = models.build(net.config)
    assert type(again) is type(net) and again.config == net.config
    assert {k: a.shape for k, a in again.state().items()} == {
        k: a.shape for k, a in net.state().items()}
    again.load_state(net.state())
    x = np.random.default_rng(2).standard_normal((2, 9, 33, 17)[: net.config["rank"] + 1] + (2,))
    with ts.no_grad():
        np.testing.assert_array_equal(again.eval()(x).data, net.eval()(x).data)
    for key, value in options.items():
        assert net.config[key] == value


@pytest.mark.parametrize("options", [
    {"backbone": "resnet20"}, {"rank": 0}, {"rank": 4}, {"rank": "2"}, {"output_stride": 4},
    {"head": "segformer"}, {"classes": 0}, {"in_channels": 0}, {"classes": -2},
    {"depth": 3, "rank": 2}, {"depth_padding": "edge", "rank": 2}, {"pool_depth": 1, "rank": 1},
    {"depth": 0}, {"depth": "all"}, {"depth": (3,)}, {"depth": (3, 3, 3)}, {"depth": (3, 0)},
    {"depth": 2.5}, {"depth_stride": 2}, {"depth_dilation": 2}, {"depth_dilation": "zero"},
    {"rank": True}, {"classes": True}, {"in_channels": True}, {"depth": True}, {"rank": 3.0},
    {"depth_dilation": True}, {"pool_depth": True}, {"depth_stride": 1.0}, {"classes": 3.0},
    {"head": "unet", "decoder": ()}, {"head": "unet", "decoder": (8, 0)},
    {"head": "unet", "decoder": 8}, {"head": "unet", "decoder": (2,) * 6},
    {"head": "unet", "norm": "layer"}, {"head": "unet", "output_stride": 8},
    {"depth_stride": (1, 2)}, {"depth_stride": (1, 2, 2, 2)}, {"depth_stride": (1, 3, 2)},
    {"output_stride": 16, "depth_stride": (1, 2, 2)}, {"depth_stride": (1, 2, 2), "rank": 2},
    {"depth_padding": "reflect"}, {"pool_depth": 0}, {"pool_depth": -1}, {"pool_depth": 1.5},
])
def test_wrong_arguments(options):
    key = list(options)[-1]
    with pytest.raises(ValueError, match=key.partition("_")[0]):
        models.resnet_seg(**{"rank": 3, "in_channels": 1, "classes": 2, **options})


def test_wrong_inputs():
    net = models.resnet_seg(rank=2, in_channels=2, classes=3)
    with pytest.raises(ValueError, match="does not fit"):
        net(np.zeros((1, 17, 17, 3), "float32"))
    with pytest.raises(ValueError, match="does not fit"):
        net(np.zeros((1, 3, 17, 17, 2), "float32"))
    for config in ({"model": "unet"}, {}, {"model": ["resnet"]}):
        with pytest.raises((ValueError, TypeError)):
            models.build(config)


@pytest.fixture
def table(monkeypatch):
    """The registered makers, as they were before the test when it ends."""
    monkeypatch.setattr(models.networks, "MAKERS", dict(models.networks.MAKERS))


def pair(width=3, seed=0):
    return ts.nn.Sequential(ts.nn.Conv(1, width, (3, 3), rng=seed), ts.nn.BatchNorm(width))


def test_a_maker_of_ones_own_is_built_by_its_name(table):
    with pytest.raises(ValueError, match="'pair'; expected one of resnet_seg, resnet"):
        models.build({"model": "pair"})
    models.register("pair", pair)
    models.register("pair", pair)  # as a module that is loaded twice does
    net = models.build({"model": "pair", "width": 5, "seed": 4})
    assert net[0].weight.shape == (3, 3, 1, 5) and net.config == {"model": "pair", "width": 5}
    np.testing.assert_array_equal(net[0].weight.data, pair(5, 4)[0].weight.data)
    with pytest.raises(ValueError, match="'resnet' is the name of another maker"):
        models.register("resnet", pair)
    with pytest.raises(TypeError, match="takes no seed"):
        models.register("other", lambda width: pair(width))


@pytest.mark.parametrize("head", list(models.HEADS))
def test_a_network_begins_at_the_shares_of_classes(head):
    net = models.resnet_seg(rank=2, in_channels=1, classes=4, head=head, seed=3)
    for conv in (m for m in net.modules() if isinstance(m, ts.nn.Conv) and m.bias is not None):
        conv.weight.data[...] = 0  # of the logits, which the features leave to the bias
    net.prior((6, 3, 1, 0))
    with ts.no_grad():
        found = ts.ops.softmax(net.eval()(np.ones((1, 32, 40, 1), "float32"))).data
    expected = np.array([0.6, 0.3, 0.1, 0.001]) / 1.001  # a class that was not seen is rare
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5)


@pytest.mark.parametrize("shares", [(1, 1), (1, -1, 1), (0, 0, 0), (1, np.nan, 1), 1.0])
def test_what_is_no_share_is_no_prior(shares):
    net = models.resnet_seg(rank=1, in_channels=1, classes=3)
    before = net.fc.bias.data.copy()
    with pytest.raises(ValueError, match="expected 3 numbers"):
        net.prior(shares)
    np.testing.assert_array_equal(net.fc.bias.data, before)


@pytest.mark.parametrize("option", [{"decoder": (64, 32)}, {"norm": "group"}])
def test_options_of_a_decoder_go_with_one(option):
    with pytest.raises(ValueError, match="they go with"):
        models.resnet_seg(rank=2, in_channels=1, classes=3, head="fcn", **option)

"""Where a network stands in a foreign file: prefixes, other heads, what is left out and said."""

import re
import warnings

import numpy as np
import pytest
from test_pretrained import (
    awake,
    evaluate,
    foreign,
    needs_torch,
    normal,
    numbered,
    save,
    torch,
    unchanged,
)

import tinyseg as ts
from tinyseg import pretrained
from tinyseg.__main__ import main
from tinyseg.nn import Conv, Linear, Module, Sequential

KEPT = {"model": "resnet", "backbone": "resnet18", "rank": 2, "in_channels": 3, "classes": 4}


@pytest.fixture(scope="module")
def net():
    return awake(ts.models.resnet(rank=2, in_channels=3, classes=4))


@pytest.fixture(scope="module")
def whole(net):
    """Its state in PyTorch's layout."""
    return foreign(net.state())


@pytest.fixture(scope="module")
def trunk(whole):
    return {name: a for name, a in whole.items() if not name.startswith("fc.")}


def behind(prefix, state):
    return {prefix + name: a for name, a in state.items()}


def segmenter():
    return ts.models.resnet_seg(rank=2, in_channels=3, classes=2, seed=9)


def same_trunk(net, trunk):
    """Whether all but the head is what the file has."""
    state = foreign(net.state())
    return all(np.array_equal(state[name], a) for name, a in trunk.items())


W = np.ones((2, 512), "float32")
WRAPPED = {  # where it comes from: prefix, what else there is
    "torch.compile": ("_orig_mod.", {}), "net": ("net.", {}), "resnet": ("resnet.", {}),
    "Lightning": ("model.net.", {}), "BYOL": ("online_network.encoder.", {}),
    "timm": ("", {"head.weight": W, "head.bias": W[:, 0]}),
    "pretrained-models": ("", {"last_linear.weight": W}),
    "SwAV": ("module.", {"module.projection_head.0.weight": W, "module.prototypes.weight": W}),
    "SimSiam": ("module.encoder.",
                {"module.predictor.0.weight": W, "module.encoder.fc.0.weight": W}),
    "SMP": ("encoder.", {"decoder.blocks.0.conv1.0.weight": W, "segmentation_head.0.weight": W}),
    "mmpretrain": ("backbone.", {"head.fc.weight": W}),
    "MoCo": ("module.encoder_q.", {"module.queue": W, "module.encoder_q.fc.2.weight": W}),
}


@pytest.mark.parametrize("children", [False, True], ids=["named", "numbered"])
@pytest.mark.parametrize("source", WRAPPED)
def test_a_trunk_is_found_behind_any_prefix_and_beside_any_head(trunk, source, children):
    prefix, more = WRAPPED[source]
    state = trunk
    if children:
        state = {numbered(name).removeprefix("backbone."): a for name, a in trunk.items()}
    state = {**more, **behind(prefix, state)}
    new = segmenter()
    head = {n: a for n, a in new.state().items() if n.startswith("fc.")}
    report = pretrained.load(new, state, head="drop")
    assert same_trunk(new, trunk)
    assert all(np.array_equal(a, new.state()[n]) for n, a in head.items())
    assert report.prefix == prefix and (not prefix or f"prefix    {prefix}" in str(report))
    assert sorted(report.unexpected) == sorted(name.removeprefix(prefix) for name in more)
    assert all(name in str(report) for name in report.unexpected)

    before = new.state()  # what is not the head's is never dropped
    with pytest.raises(ValueError, match="layer1.0.se.weight is not in the network"):
        pretrained.load(new, {**state, f"{prefix}layer1.0.se.weight": W}, head="drop")
    with pytest.raises(ValueError, match="fc.weight is missing"):
        pretrained.load(new, state)
    assert unchanged(new, before)


@pytest.mark.parametrize("prefix", ["net.", "module.encoder.", "online_network.encoder."])
def test_a_whole_network_is_recognised_behind_any_prefix(tmp_path, net, whole, prefix):
    more = {"ema_decay": np.ones(1), "queue": W}
    assert pretrained.recognise({**more, **behind(prefix, whole)}) == KEPT
    new = ts.models.build(KEPT)
    report = pretrained.load(new, save(tmp_path / "a.npz", {**more, **behind(prefix, whole)}))
    assert unchanged(new, net.state()) and report.prefix == prefix
    assert report.unexpected == list(more)  # elsewhere: said, and no error
    with pytest.raises(ValueError, match="queue is not in the network"):
        pretrained.load(new, {**behind(prefix, whole), f"{prefix}queue": W})


def test_a_head_may_stand_beside_its_backbone(net, whole, trunk):
    head = {name: a for name, a in whole.items() if name not in trunk}
    for state in ({**behind("module.backbone.", trunk), **behind("module.", head)},
                  {**behind("backbone.", trunk), **head}):
        assert pretrained.recognise(state) == KEPT
        new = ts.models.build(KEPT)
        report = pretrained.load(new, state)
        assert unchanged(new, net.state()) and not report.unexpected
    both = {**behind("module.encoder.", whole), "module.fc.weight": W, "module.fc.bias": W[:, 0]}
    new = ts.models.build(KEPT)
    report = pretrained.load(new, both)  # its own goes first
    assert unchanged(new, net.state())
    assert report.unexpected == ["module.fc.weight", "module.fc.bias"]


def test_two_that_fit_are_named_and_one_may_be_chosen(net, whole):
    other = {name: a + 1 for name, a in whole.items()}
    state = {**behind("student.", whole), **behind("teacher.", other), "center": W}
    new = ts.models.build(KEPT)
    before = new.state()
    for call in (pretrained.recognise, lambda state: pretrained.load(new, state)):
        with pytest.raises(ValueError, match=r'"student." and "teacher.".*prefix="teacher."'):
            call(state)
    assert unchanged(new, before)
    for prefix, wanted in (("student.", whole), ("teacher", other)):
        assert pretrained.recognise(state, prefix=prefix) == KEPT
        report = pretrained.load(new, state, prefix=prefix)
        assert same_trunk(new, wanted) and report.prefix == prefix.rstrip(".") + "."
        assert len(report.unexpected) == len(whole) + 1
    assert pretrained.recognise(state, ignore="student.*") == KEPT
    report = pretrained.load(new, state, ignore=["student.*", "center"])
    assert same_trunk(new, other) and len(report.unexpected) == len(whole) + 1
    with pytest.raises(ValueError, match=r"no name begins with teachr\.; .*student.conv1.weight"):
        pretrained.load(new, state, prefix="teachr.")
    with pytest.raises(ValueError, match="conv1.weight is missing"):
        pretrained.load(new, state, prefix="")
    nested = {**behind("net.", whole), **behind("net.ema.", other)}
    for head in ("keep", "drop", "fit"):  # the one inside the other is another one
        with pytest.raises(ValueError, match=r'"net." and "net.ema."'):
            pretrained.load(new, nested, head=head)
        for prefix, wanted in (("net.", whole), ("net.ema.", other)):
            assert pretrained.load(new, nested, head=head, prefix=prefix).prefix == prefix
            assert np.array_equal(new.bn1.bias.data, wanted["bn1.bias"])
    moments = {k: a for k, a in whole.items() if "running" not in k}
    beside = {**behind("model.", whole), **behind("opt.exp_avg.", moments)}
    assert pretrained.recognise(beside) == KEPT
    assert pretrained.load(new, beside).prefix == "model."
    del state["teacher.bn1.bias"]  # then only one fits, though both have most names
    state["student.layer1.0.bn1.bias"] = W
    state["student.layer9"] = W
    with pytest.raises(ValueError, match="does not fit"):
        pretrained.load(new, state)


@needs_torch
def test_a_state_dict_of_pytorch_goes_in_as_it_is(net, whole):
    new = ts.models.build(KEPT)
    state = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in whole.items()}
    report = pretrained.load(new, behind("module.", state))
    assert unchanged(new, net.state()) and report.source == "the arrays given"


def test_of_two_networks_the_one_that_fits_is_found(net, whole):
    larger = foreign(ts.models.resnet("resnet34", rank=2, in_channels=3, classes=4).state())
    new = ts.models.build(KEPT)
    for prefixes in (("a.", "b."), ("b.", "a.")):
        state = {**behind(prefixes[0], whole), **behind(prefixes[1], larger)}
        assert pretrained.load(new, state).prefix == prefixes[0]
        assert unchanged(new, net.state())


def test_names_are_changed_as_re_sub_does(net, whole):
    odd = {name.replace("downsample", "shortcut").replace("fc.", "linear."): a
           for name, a in behind("module.", whole).items()}
    new = ts.models.build(KEPT)
    before = new.state()
    with pytest.raises(ValueError, match="downsample.0.weight is missing"):
        pretrained.load(new, odd)
    for rename in ({"shortcut": "downsample", r"linear\.(\w+)$": r"fc.\1"},
                   [("shortcut", "downsample"), (r"^module\.linear", "module.fc")]):
        assert pretrained.recognise(odd, rename=rename) == KEPT
        new.load_state(before)
        assert not pretrained.load(new, odd, rename=rename).unexpected
        assert unchanged(new, net.state())
    with pytest.raises(ValueError, match="both called conv1"):
        pretrained.load(new, odd, rename={".*weight": "conv1"})
    for options in ({"rename": {"(": ""}}, {"ignore": ["*.queue"]}):
        with pytest.raises(ValueError, match=r"is no regular expression .*head\.\*"):
            pretrained.load(new, odd, **options)


def test_what_is_ignored_is_said(whole, trunk):
    new = ts.models.build(KEPT)
    more = {"queue": W, "projection.0.weight": W, "projection.0.bias": W[:, 0]}
    with pytest.raises(ValueError, match=r"queue is not in(.|\n)*ignore leaves out"):
        pretrained.load(new, {**whole, **more})
    report = pretrained.load(new, {**whole, **more}, ignore=["queue", "projection.*"])
    assert sorted(report.unexpected) == sorted(more)
    assert "not used  queue" in str(report) and "projection.0.* (2 tensors)" in str(report)
    with pytest.raises(ValueError, match="queue is not in"):  # the whole name, no part of it
        pretrained.load(new, {**whole, **more}, ignore=["projection.*", "que"])
    state = behind("module.", {**whole, **more})
    for ignore in (["queue", "projection.*"], ["module.queue", r"module\.projection.*"]):
        assert len(pretrained.load(new, state, ignore=ignore).unexpected) == 3
    report = pretrained.load(new, whole, ignore="fc.*", allow_missing=["fc."])
    assert report.missing == report.unexpected == ["fc.weight", "fc.bias"]


def test_a_head_is_kept_where_it_fits(tmp_path, net, whole, trunk):
    for state, classes, kept in ((whole, 4, True), (whole, 5, False), (trunk, 4, False),
                                 (behind("module.", {**trunk, "last.weight": W}), 4, False)):
        new = ts.models.resnet(rank=2, in_channels=3, classes=classes, seed=3)
        head = new.state()["fc.weight"]
        report = pretrained.load(new, state, head="fit")
        assert same_trunk(new, trunk)
        wanted = net.state()["fc.weight"] if kept else head
        assert np.array_equal(new.state()["fc.weight"], wanted)
        assert any("the head stays" in note for note in report.notes) is not kept
    with pytest.raises(ValueError, match="layer2.0.conv1.weight is missing"):
        pretrained.load(new, {k: a for k, a in whole.items() if k != "layer2.0.conv1.weight"},
                        head="fit")
    ts.save(tmp_path / "ours.npz", net)
    assert pretrained.load(new, tmp_path / "ours.npz", head="fit").notes == []


def test_children_by_number_stay_numbers_in_a_network_that_has_them():
    rng = np.random.default_rng(0)
    net = Sequential(Conv(3, 4, (3, 3), rng=rng), Conv(4, 4, (3, 3), rng=rng))
    state = {name: a + 1 for name, a in foreign(net.state()).items()}
    pretrained.load(net, behind("module.", state))
    assert all(np.array_equal(foreign(net.state())[name], a) for name, a in state.items())


def test_weights_of_volumes_go_into_a_network_of_volumes():
    net, new = (ts.models.resnet_seg(rank=3, in_channels=1, classes=2, seed=n) for n in (1, 2))
    state = behind("module.", foreign(awake(net).state()))
    with pytest.raises(ValueError, match="kernels are 3D.*rank=3"):
        pretrained.recognise(state)
    pretrained.load(new, state)
    x = normal(1, 9, 11, 13, 1)
    assert np.array_equal(evaluate(new, x), evaluate(net, x))


# -- refusals --------------------------------------------------------------------------------------

class Own(Module):
    """A stem and nothing to normalise it."""

    def __init__(self):
        self.conv1 = Conv(1, 4, (3, 3), rng=np.random.default_rng(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var", "fc.bias"])
def test_weights_that_are_not_finite_are_refused(net, whole, name, bad):
    state = {**whole, name: whole[name].astype("float64")}
    state[name].flat[-1] = bad
    new = ts.models.build(KEPT)
    before = new.state()
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinite"):
        pretrained.load(new, state)
    assert unchanged(new, before)
    if name == "fc.bias":  # nobody needs it then
        pretrained.load(new, state, head="drop")
    if bad == 1e300:  # and here it is finite
        pretrained.load(ts.models.build(KEPT).astype("float64"), state)


def test_a_network_without_bn1_has_no_place_for_the_mean_of_its_colours():
    state = {"conv1.weight": np.ones((4, 3, 3, 3), "f4"), "conv1.bias": np.zeros(4, "f4")}
    with pytest.raises(ValueError, match='bn1.running_mean.*stem="imagenet".*stem="sum"'):
        pretrained.load(Own(), state, stem="imagenet")
    report = pretrained.load(Own(), state)
    assert report.notes == ["RGB stem to 1 channels: sum"]


def test_one_text_is_one_name():
    state = {"conv1.weight": np.ones((4, 1, 3, 3), "f4")}
    assert pretrained.load(Own(), state, allow_missing="conv1.bias").missing == ["conv1.bias"]
    assert pretrained.load(Own(), state, allow_missing="conv1.").missing == ["conv1.bias"]
    with pytest.raises(ValueError, match="conv1.bias is missing"):
        pretrained.load(Own(), state, allow_missing="conv1")


def test_nothing_in_common_shows_what_there_is():
    state = {"blocks.0.attn.qkv.weight": W, "pos_embed": W}
    with pytest.raises(ValueError, match="the first there are blocks.0.attn.qkv.weight, pos_embed"):
        pretrained.load(Own(), state)
    many = {f"tower{i}.conv1.weight": W for i in range(3000)}  # alike: not each is tried
    with pytest.raises(ValueError, match='under "tower0."'):
        pretrained.load(Own(), many)
    with pytest.raises(ValueError, match="no ResNet"):
        pretrained.recognise(many)
    layers = Sequential(*(Linear(2, 2, rng=np.random.default_rng(0)) for _ in range(2)))
    towers = {f"{tower}.{i}.{n}": np.ones((2, 2)[: 1 + (n == "weight")], "f4")
              for tower in "ab" for i in (0, 1) for n in ("weight", "bias")}
    with pytest.raises(ValueError, match='"a." and "b."'):
        pretrained.load(layers, towers)


def zeros(*shape):
    return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize("change, told", [
    ({"conv1.weight": None, "conv1.0.weight": zeros(32, 3, 3, 3)}, "deep stem"),
    ({"conv1.weight": zeros(64, 1, 7, 7, 7)}, "kernels are 3D"),
    ({"conv1.weight": None, "conv1.weight_v": zeros(64, 3, 7, 7)}, "weight norm"),
    ({"layer1.0.conv2.weight": zeros(128, 4, 3, 3)}, "over 4 of 128 channels.*ResNeXt"),
    ({"layer1.0.conv2.weight": zeros(128, 128, 3, 3)}, "128 filters.*expected 64"),
])
def test_relatives_of_resnets_are_told_apart(whole, change, told):
    state = behind("module.", {k: a for k, a in {**whole, **change}.items() if a is not None})
    with pytest.raises(ValueError, match=f"no ResNet that is known: blocks as resnet18.*{told}"):
        pretrained.recognise(state)
    with pytest.raises(ValueError, match=told):
        pretrained.load(ts.models.build(KEPT), state)


def test_our_own_file_is_not_to_be_imported(tmp_path, net, capsys):
    ours, target = tmp_path / "ours.npz", tmp_path / "again.npz"
    ts.save(ours, net)
    assert main(["convert", str(ours), str(target)]) == 1
    assert re.search("ours.npz: a file of tinyseg already.*ts.load", capsys.readouterr().err)
    assert not target.exists()


# -- python -m tinyseg convert ---------------------------------------------------------------------

def test_convert_finds_chooses_renames_and_ignores(tmp_path, net, whole, capsys):
    target = tmp_path / "net.npz"
    for state, options, told in (
        (behind("online_network.encoder.", whole), (), "prefix    online_network.encoder."),
        ({**behind("student.", whole), **behind("teacher.", whole)}, ("--prefix", "teacher."),
         "not used  student.layer1.* "),
        ({**{n.replace("fc.", "linear."): a for n, a in whole.items()}, "queue": W},
         ("--rename", "^linear=fc", "--ignore", "queue"), "not used  queue"),
    ):
        source = save(tmp_path / "a.npz", state)
        assert main(["convert", str(source), str(target), *options]) == 0
        said = capsys.readouterr()
        assert told in said.out and not said.err
        assert unchanged(ts.load(target), net.state())
        target.unlink()


def test_convert_says_what_to_do(tmp_path, whole, trunk, capsys):
    target = tmp_path / "net.npz"
    two = {**behind("student.", whole), **behind("teacher.", whole)}
    for state, options, told in (
        (two, [], '"student." and "teacher."'), (trunk, [], "--pretrained"),
        ({**whole, "queue": W}, [], "queue is not in"),
        (whole, ["--prefix", "x"], "no name begins"),
        (whole, ["--ignore", "*"], "no regular expression"),
        ({**whole, "fc.bias": whole["fc.bias"] * np.nan}, [], "fc.bias holds NaN"),
    ):
        source = save(tmp_path / "a.npz", state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main(["convert", str(source), str(target), *options]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: {source}: ") and told in message
        assert not target.exists()
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(source), str(target), "--rename", "a"])
    assert caught.value.code == 2 and "PATTERN=TEXT" in capsys.readouterr().err

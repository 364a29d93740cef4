"""Networks for other programs: PyTorch's layout in a safetensors file, or an ONNX graph.

A pass through a network records which operation answered what (see graph); here each becomes the
ONNX operators that give the same, channels first. Neither PyTorch nor a runtime is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from .backend import to_numpy
from .files import whole
from .graph import Node
from .module import Module, to_device
from .nn import Conv, Linear
from .ops import _pooling
from .tensor import Tensor, keeping_inputs
from .windows import Window

OPSET = 18  # the first whose Resize names its axes
ENDINGS = (".onnx", ".safetensors")


def channels_first(array: np.ndarray) -> np.ndarray:
    """(*K, I, O) -> (O, I, *K), as PyTorch keeps kernels and matrices; the inverse of what
    `pretrained` does.

    >>> ts.export.channels_first(np.ones((3, 4, 2, 5))).shape
    (5, 2, 3, 4)
    """
    return np.moveaxis(array, (-1, -2), (0, 1))


def state_dict(net: Module) -> dict[str, np.ndarray]:
    """{name: array} of a network under its own names, torchvision's, in PyTorch's layout.

    ValueError for what PyTorch has no layer for: ways along depth beside a kernel.

    >>> net = ts.nn.Sequential(ts.nn.Conv(2, 5, (3, 4), rng=0))
    >>> {name: array.shape for name, array in ts.export.state_dict(net).items()}
    {'0.weight': (5, 2, 3, 4), '0.bias': (5,)}
    """
    moved = set()
    for name, layer in [("", net), *net.named(Module)]:
        if not isinstance(layer, Conv | Linear):
            continue
        if (along := getattr(layer, "along", None)) is not None:
            raise ValueError(f"{name} computes along depth by {type(along).__name__}, which "
                             "no layer of PyTorch does; expected kernels alone (.onnx takes all)")
        moved.add(f"{name}.weight".lstrip("."))
    return {name: np.ascontiguousarray(channels_first(a) if name in moved else a)
            for name, a in ((name, to_numpy(a)) for name, a in net.state().items())}


def write(path: str | Path, net: Module, size: Sequence[int] = (), **metadata: Any) -> None:
    """Write a network to PATH, whole or not at all: .safetensors (see `state_dict`) or .onnx.

    size: of .onnx, along the spatial axes, which the graph is made for, by default those of the
    "patch" in `metadata`; any number of images or volumes passes through it, float32 (N, C, *size)
    to logits (N, classes, *size), called "image" and "logits". The network's config and `metadata`
    go with it, as JSON. RuntimeError where the package of the format is missing, ValueError for
    another ending and for what it cannot hold.
    """
    path = Path(path)
    told = {"config": json.dumps(getattr(net, "config", {})), "metadata": json.dumps(metadata)}
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save

            content = save(state_dict(net), told)
        elif path.suffix == ".onnx":
            patch = metadata.get("patch", ())[-getattr(net, "config", {}).get("rank", 0):]
            content = onnx(net, size or patch, told).SerializeToString()
        else:
            raise ValueError(f"{path}: expected a name that ends in {' or '.join(ENDINGS)}")
    except ImportError as error:
        package = path.suffix[1:]
        raise RuntimeError(f"{path}: needs the package {package}, which is not here ({error}); pip "
                           f"install {package}") from None
    with whole(path) as draft:
        draft.write_bytes(content)


def onnx(net: Module, size: Sequence[int], metadata: dict[str, str] | None = None) -> Any:
    """The onnx.ModelProto of a network in evaluation mode, for inputs of this size; see `write`."""
    from onnx import TensorProto, checker, helper

    config = getattr(net, "config", {})
    if "in_channels" not in config:
        raise ValueError(f"{type(net).__name__} has no config that says in_channels; expected one, "
                         "as what models.build makes has, or net.config = {'in_channels': ...}")
    if len(size) != config.get("rank", len(size)) or not len(size):
        raise ValueError(f"found the size {tuple(size)}, expected a number for each of the "
                         f"{config.get('rank', '')} spatial axes")
    net, graph = to_device(net.copy().eval(), "cpu"), Graph()
    for parameter in net.parameters():  # what is computed of them alone is a constant
        parameter.requires_grad = False
    x = Tensor(np.zeros((1, *size, config["in_channels"]), "float32"), requires_grad=True)
    with keeping_inputs():
        y = net(x)
    graph.names[x] = "image"
    graph.add("Identity", [graph.visit(y.node)], to="logits")
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", t.shape[-1],
                                                                   *t.shape[1:-1]])
            for name, t in (("image", x), ("logits", y))]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "tinyseg", told[:1], told[1:], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="tinyseg")
    helper.set_model_props(model, metadata or {})
    checker.check_model(model)
    return model


class Graph:
    """Nodes and constants of an ONNX graph, and how vertices of ours are called in it."""

    def __init__(self):
        self.nodes, self.constants, self.names, self._new = [], [], {}, count()

    def add(self, operator: str, inputs: list[str], to: str | None = None, **attributes: Any
            ) -> str:
        """One operator more; the name of its answer."""
        from onnx import helper

        to = to or f"{operator}_{next(self._new)}"
        self.nodes.append(helper.make_node(operator, inputs, [to], **attributes))
        return to

    def constant(self, numbers: Any, dtype: str = "float32") -> str:
        """An array that the graph holds; its name."""
        from onnx import numpy_helper

        name = f"constant_{next(self._new)}"
        array = np.ascontiguousarray(np.asarray(numbers, dtype))
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def visit(self, vertex: Any) -> str:
        """The name of a vertex, once all before it stand in the graph."""
        waiting = [vertex]
        while waiting:
            here = waiting[-1]
            missing = [parent for parent, _ in here.edges if parent not in self.names]
            if here in self.names or missing:
                waiting = waiting[:-1] if here in self.names else waiting + missing
                continue
            if here.name not in OPERATORS:
                raise ValueError(f"the operation {here.name} has no form in ONNX here; expected "
                                 f"some of {', '.join(OPERATORS)}")
            self.names[here] = OPERATORS[here.name](self, here)
        return self.names[vertex]

    def inputs(self, node: Node) -> list[str]:
        """The names of an operation's inputs; constants get the axes of its answer."""
        named = {i: self.names[parent] for parent, i in node.edges}
        rank = len(node.shape)
        for i in node.options:
            if isinstance(i, int) and i not in named:
                array = np.asarray(_array(node, i), "float32")
                array = array.reshape((1,) * (rank - array.ndim) + array.shape)
                named[i] = self.constant(np.moveaxis(array, -1, 1) if rank > 1 else array)
        return [named[i] for i in sorted(named)]


def _axis(axis: int, rank: int) -> int:
    """Where an axis of a channels-last array stands in a channels-first one."""
    axis %= rank
    return 0 if axis == 0 else 1 if axis == rank - 1 else axis + 1


def _array(node: Node, i: int) -> Any:
    """An input that does not depend on the image, as an array, a number or None."""
    x = node.options.get(i)
    return x.data if isinstance(x, Tensor) else x


def _first(graph: Graph, node: Node) -> str:
    """The name of the first input; ValueError where that is constant."""
    if node.edges[0][1]:
        raise ValueError(f"{node.name} of a constant has no form in ONNX here")
    return graph.names[node.edges[0][0]]


def _convolved(graph: Graph, x: str, node: Node, window: Window) -> str:
    """A convolution of what is called x; what repeats the edge is padded before."""
    x, pads = _padded(graph, x, window, True), _pads(window, False)
    weights = [graph.constant(channels_first(_array(node, 1)))]
    weights += [] if _array(node, 2) is None else [graph.constant(_array(node, 2))]
    return _finished(graph, graph.add(
        "Conv", [x, *weights], kernel_shape=window.kernel, strides=window.stride,
        dilations=window.dilation, pads=sum(zip(*pads, strict=True), ())), node)


def _finished(graph: Graph, y: str, node: Node) -> str:
    """[+ residual], the fourth input, then max(., 0), as the options ask for it."""
    added = [graph.names[parent] for parent, i in node.edges if i == 3] or [
        graph.constant(np.moveaxis(a, -1, 1)) for a in [_array(node, 3)] if a is not None]
    y = graph.add("Add", [y, *added]) if added else y
    return graph.add("Relu", [y]) if node.options.get("relu") else y


def _pads(window: Window, edge: bool) -> list[tuple[int, int]]:
    """The padding of the axes that repeat their edge, or of those that are padded with zeros."""
    return [pair if repeats == edge else (0, 0)
            for pair, repeats in zip(window.padding, window.edge, strict=True)]


def _padded(graph: Graph, x: str, window: Window, edge: bool) -> str:
    pads = _pads(window, edge)
    if not any(map(any, pads)):
        return x
    flat = [0, 0, *(a for a, _ in pads), 0, 0, *(b for _, b in pads)]
    return graph.add("Pad", [x, graph.constant(flat, "int64")], mode="edge" if edge else "constant")


def _options(node: Node) -> dict[str, Any]:
    """The options of an operation that were given, but `relu`."""
    return {k: value for k, value in node.options.items() if isinstance(k, str) and k != "relu"}


def _conv(graph: Graph, node: Node) -> str:
    window = Window.of(np.shape(_array(node, 1))[:-2], **_options(node))
    return _convolved(graph, _first(graph, node), node, window)


def _doubled(graph: Graph, x: str, before: tuple[int, ...], size: tuple[int, ...]) -> str:
    """Each position twice along the axes that change, and no more than `size`."""
    axes = [i + 2 for i, (n, m) in enumerate(zip(before, size, strict=True)) if n != m]
    if axes:
        x = graph.add("Resize", [x, "", graph.constant([2] * len(axes))], axes=axes,
                      mode="nearest", coordinate_transformation_mode="asymmetric",
                      nearest_mode="floor")
        x = _cut(graph, x, [(axis, 0, size[axis - 2], 1) for axis in axes])
    return x


def _cut(graph: Graph, x: str, cuts: list[tuple[int, int, int, int]]) -> str:
    """Slices (axis, from, to, step)."""
    axes, starts, stops, steps = (graph.constant(part, "int64") for part in zip(*cuts, strict=True))
    return graph.add("Slice", [x, starts, stops, axes, steps])


def _double(graph: Graph, node: Node) -> str:
    (parent, _), *skip = node.edges
    x = _doubled(graph, graph.names[parent], parent.shape[1:-1], node.options["size"])
    return graph.add("Concat", [x, graph.names[skip[0][0]]], axis=1) if skip else x


def _conv_phases(graph: Graph, node: Node) -> str:
    (parent, _), = node.edges
    x = _doubled(graph, graph.names[parent], parent.shape[1:-1], node.options["size"])
    return _convolved(graph, x, node, node.options["window"])


def _batch_norm(graph: Graph, node: Node) -> str:
    numbers = [graph.constant(to_numpy(a)) for a in (
        _array(node, 1), _array(node, 2), *(node.options[f"running_{s}"] for s in ("mean", "var")))]
    return _finished(graph, graph.add("BatchNormalization", [_first(graph, node), *numbers],
                                      epsilon=node.options.get("eps", 1e-5)), node)


def _group_norm(graph: Graph, node: Node) -> str:
    """Instance-norm of the groups, as the operator for it is newer than OPSET."""
    groups, rank = node.options["groups"], len(node.shape)
    shape = graph.constant([0, node.shape[-1], *node.shape[1:-1]], "int64")
    y = graph.add("Reshape", [_first(graph, node), graph.constant([0, groups, -1], "int64")])
    y = graph.add("InstanceNormalization", [y, graph.constant([1] * groups),
                                            graph.constant([0] * groups)],
                  epsilon=node.options.get("eps", 1e-5))
    y = graph.add("Reshape", [y, shape])
    for operator, i in (("Mul", 1), ("Add", 2)):
        numbers = _array(node, i).reshape(-1, *(1,) * (rank - 2))
        y = graph.add(operator, [y, graph.constant(numbers)])
    return y


def _max_pool(graph: Graph, node: Node) -> str:
    window = _pooling(len(node.shape) - 2, **_options(node))
    return graph.add("MaxPool", [_first(graph, node)], kernel_shape=window.kernel,
                     strides=window.stride, dilations=window.dilation,
                     pads=[n for pair in zip(*window.padding, strict=True) for n in pair])


def _upsample(graph: Graph, node: Node) -> str:
    corners = node.options["align_corners"]
    return graph.add("Resize", [_first(graph, node), "", "", graph.constant(
        node.options["size"], "int64")], axes=[*range(2, len(node.shape))], mode="linear",
        coordinate_transformation_mode="align_corners" if corners else "half_pixel")


def _pad(graph: Graph, node: Node) -> str:
    window = Window.of((1,) * (len(node.shape) - 2), **_options(node))
    return _padded(graph, _padded(graph, _first(graph, node), window, True), window, False)


def _index(graph: Graph, node: Node) -> str:
    (parent, _), key = node.edges[0], node.options["key"]
    rank, key = len(parent.shape), key if isinstance(key, tuple) else (key,)
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *[slice(None)] * (rank - len(key) + 1), *key[at + 1 :])
    if not all(isinstance(k, slice) and (k.step or 1) > 0 for k in key):
        raise ValueError(f"the index {key} has no form in ONNX here; expected slices forwards")
    x, cuts = graph.names[parent], [(_axis(i, rank), *k.indices(parent.shape[i]))
                                    for i, k in enumerate(key) if k != slice(None)]
    return _cut(graph, x, cuts) if cuts else x


def _sum(graph: Graph, node: Node) -> str:
    (parent, _), axis = node.edges[0], node.options.get("axis")
    rank = len(parent.shape)
    axes = [_axis(a, rank) for a in (range(rank) if axis is None else np.atleast_1d(axis))]
    return graph.add("ReduceSum", [graph.names[parent], graph.constant(axes, "int64")],
                     keepdims=int(node.options.get("keepdims", False)))


def _along(operator: str) -> Callable[[Graph, Node], str]:
    return lambda graph, node: graph.add(operator, graph.inputs(node), axis=_axis(
        node.options.get("axis", -1), len(node.shape)))


def _same(operator: str) -> Callable[[Graph, Node], str]:
    return lambda graph, node: graph.add(operator, graph.inputs(node))


def _matmul(graph: Graph, node: Node) -> str:
    w = _array(node, 1)
    if [i for _, i in node.edges] != [0] or np.ndim(w) != 2:
        raise ValueError("this matmul has no form in ONNX here; expected x @ a constant matrix")
    x, ones = _first(graph, node), (1,) * (len(node.shape) - 2)
    if not ones:
        return graph.add("MatMul", [x, graph.constant(w)])
    kernel = channels_first(np.reshape(w, (*ones, *w.shape)))  # channels stand first there
    return graph.add("Conv", [x, graph.constant(kernel)], kernel_shape=ones)


OPERATORS: dict[str, Callable[[Graph, Node], str]] = {
    "conv": _conv, "conv_phases": _conv_phases, "double": _double, "batch_norm": _batch_norm,
    "group_norm": _group_norm, "max_pool": _max_pool, "upsample": _upsample, "pad": _pad,
    "index": _index, "sum": _sum, "matmul": _matmul, "concatenate": _along("Concat"),
    "softmax": _along("Softmax"), "add": _same("Add"), "subtract": _same("Sub"),
    "multiply": _same("Mul"), "divide": _same("Div"), "relu": _same("Relu"), "exp": _same("Exp"),
    "log": _same("Log"), "sqrt": _same("Sqrt"), "tanh": _same("Tanh"),
    "sigmoid": _same("Sigmoid"), "absolute": _same("Abs")}

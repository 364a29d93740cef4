"""Our own files: one .npz with all arrays and one JSON text, written whole or not at all.

A network file holds the architecture (`net.config`), the state and any metadata, so that `load`
rebuilds the network from the file alone. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import models
from .backend import Array, to_numpy
from .files import whole
from .module import Module, held, is_state
from .tensor import Tensor

FORMAT = "tinyseg 1"
TEXT = "__description__"  # the JSON text among the arrays, as bytes


def fingerprint(arrays: Mapping[str, np.ndarray], description: dict) -> str:
    """SHA-256 of all that a file says: its description, and each array's name, type, shape, values.

    The archive's own checksums leave a gap: a damaged shape that is too small reads only a part of
    the array, and a part is compared with nothing.

    >>> two, three = ({"a": np.zeros(n)} for n in (2, 3))
    >>> ts.checkpoint.fingerprint(two, {}) == ts.checkpoint.fingerprint(three, {})
    False
    """
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write(path: str | Path, arrays: Mapping[str, Array], description: dict) -> None:
    """Write arrays and a JSON-able description to `path` (.npz).

    Raises OSError where that fails; what stood at `path` before is then untouched.

    >>> ts.checkpoint.write("numbers.npz", {"a": np.arange(3)}, {"unit": "mm"})
    >>> np.load("numbers.npz")["a"].tolist()
    [0, 1, 2]
    """
    path = Path(path)
    description = json.loads(json.dumps(description))  # as `read` will find it
    content = {name: np.asarray(to_numpy(array)) for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "arrays": list(content),
                       "sha256": fingerprint(content, description), **description}).encode()
    content = {TEXT: np.frombuffer(text, np.uint8), **content}
    with whole(path) as draft, open(draft, "wb") as file:
        np.savez(file, **content)  # type: ignore[arg-type]


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, description) of a file that `write` made; ValueError names a file that is not.

    >>> ts.checkpoint.write("numbers.npz", {"a": np.arange(3)}, {"unit": "mm"})
    >>> ts.checkpoint.read("numbers.npz")
    ({'a': array([0, 1, 2])}, {'unit': 'mm'})
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise ValueError("no .npz archive; `python -m tinyseg convert` imports others")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(arrays.pop(TEXT).tobytes())
        if (found := description.pop("format")) != FORMAT:
            raise ValueError(f"its format is {found!r}, expected {FORMAT!r}")
        if description.pop("arrays") != list(arrays):
            raise ValueError("its arrays are not those that were written")
        found = description.pop("sha256", None)  # the first files had none
        if found is not None and found != fingerprint(arrays, description):
            raise ValueError("its content is not what was written, the file was damaged since")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zip, zlib, npy and JSON readers each raise their own on damage
        raise ValueError(f"{path}: not a complete tinyseg checkpoint "
                         f"({type(error).__name__}: {error})") from None
    return arrays, description


def save(path: str | Path, net: Module, **metadata: Any) -> None:
    """Write a network that `net.config` rebuilds: a `resnet_seg` or `resnet`, inflated or not, or
    one whose maker `models.register` knows, here and where it is read.

    With `net.metadata`, `metadata` comes back as `load(path).metadata`: text, numbers (NumPy's as
    Python's), None, and dicts with text keys, lists and tuples (as lists) of these. What is
    frozen comes back frozen. Raises ValueError naming what `load` would not rebuild, TypeError
    naming what JSON does not keep; nothing is written then.

    >>> net = ts.models.resnet_seg(rank=2, in_channels=1, classes=3, width=4)
    >>> ts.save("net.npz", net, spacing=(2.5, 0.8, 0.8))
    >>> ts.load("net.npz").metadata
    {'spacing': [2.5, 0.8, 0.8]}
    """
    config = getattr(net, "config", None)
    if not isinstance(config, dict):
        raise ValueError(f"{type(net).__name__} has no config to rebuild it from")
    description = {"architecture": _plain(config, "config"),
                   "metadata": _plain({**getattr(net, "metadata", {}), **metadata}, "metadata"),
                   "frozen": [name for name, part in net.trainable().items() if (
                       part.frozen if isinstance(part, Module) else not part.requires_grad)]}
    mine, made = _structure(net), _structure(_outline(config))
    for name in {**made, **mine}:
        found, expected = mine.get(name, "nothing"), made.get(name, "nothing")
        if found != expected:
            raise ValueError(f"{type(net).__name__} would not be read back as it is: {name} is "
                             f"{found}, and its config makes it {expected}; what is no part of "
                             "the network belongs into net.metadata")
    arrays = net._arrays()  # no copies
    if len(dtypes := {str(a.dtype) for a in arrays.values()}) > 1:
        raise ValueError(f"{type(net).__name__} mixes {' and '.join(sorted(dtypes))}; expected "
                         "one type, as net.astype makes it")
    write(path, arrays, description)


def _plain(x: Any, name: str) -> Any:
    """`x` as JSON gives it back; TypeError naming the part of it that JSON would change or drop."""
    x = x.item() if isinstance(x, np.generic) else x
    if isinstance(x, dict):
        if wrong := [key for key in x if not isinstance(key, str)]:
            raise TypeError(f"{name} has the key {wrong[0]!r}, expected text, {str(wrong[0])!r}")
        return {key: _plain(value, f"{name} {key}") for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value, f"{name} {i}") for i, value in enumerate(x)]
    if x is None or isinstance(x, str | int | float):
        return x
    raise TypeError(f"{name} is a {type(x).__name__}, expected text, numbers, lists or dicts; "
                    "array.tolist() makes a list")


class _Zeros(np.random.Generator):
    """Draws zeros, in no time: the weights of a network that is not trained from them."""

    def standard_normal(self, size: Any = None, dtype: Any = float, out: Any = None) -> Any:
        return np.zeros(size, dtype)


def _outline(config: dict) -> Module:
    """The network of a config with all kernels zero."""
    return models.build({**config, "seed": _Zeros(np.random.default_rng(0).bit_generator)})


def _structure(net: Module) -> dict[str, Any]:
    """{name: what stands there} for all that decides what a network computes, but for the numbers
    in its arrays: classes, shapes, options, and what is shared with which name."""
    found: dict[str, Any] = {"the network": type(net)}
    first = {id(net): "the network"}
    for prefix, module in [("", net), *((f"{name}.", m) for name, m in net.named(Module))]:
        for name, thing in held(module, prefix):
            part = isinstance(thing, Module)
            if (part or is_state(thing)) and first.setdefault(id(thing), name) != name:
                found[name] = "shared with", first[id(thing)]
            elif part:
                found[name] = type(thing)
            elif is_state(thing):
                found[name] = "tensor" if isinstance(thing, Tensor) else "array", thing.shape
            else:
                found[name] = thing
    return found


def load(path: str | Path) -> Module:
    """The network in a file that `save` made, in evaluation mode, on the CPU, with `.metadata`.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.

    >>> net = ts.models.resnet(rank=2, in_channels=1, classes=5, width=4)
    >>> ts.save("net.npz", net)
    >>> again = ts.load("net.npz")
    >>> again.training, np.array_equal(again.fc.weight.data, net.fc.weight.data)
    (False, True)
    """
    arrays, description = read(path)
    if {"settings", "stage"} <= description.keys():
        raise ValueError(f"{path}: a checkpoint of training (stage {description['stage']}), which "
                         "--resume goes on from; expected a network, as the main job writes it "
                         "at the end of a stage: model_2d.npz or model_3d.npz")
    try:
        config = description["architecture"]
        if config["model"] in ("resnet_seg", "resnet"):
            claimed = config["in_channels"], config["classes"]
            last = models.HEADS[config.get("head", "linear")].last
            found = arrays["conv1.weight"].shape[-2], len(arrays[last])
            if claimed != found:  # before a network of the claimed size is made
                raise ValueError(f"{claimed} input channels and classes are claimed, {found} found")
        dtypes = {a.dtype for a in arrays.values()}
        if any(d.kind != "f" for d in dtypes):
            raise ValueError(f"expected arrays of floating-point numbers, found {dtypes}")
        net = _outline(config)
        if len(dtypes) == 1:
            net.astype(str(dtypes.pop()))
        net.load_state(arrays)
        parts, frozen = net.trainable(), description.get("frozen", [])
        for name in frozen:  # none in the files of earlier versions
            key = "frozen" if isinstance(parts[name], Module) else "requires_grad"
            setattr(parts[name], key, key == "frozen")
    except (ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path}: holds no network that can be rebuilt ({error})") from None
    net.metadata = description.get("metadata", {})
    return net.eval()

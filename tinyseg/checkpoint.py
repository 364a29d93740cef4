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
from .nn import Module

FORMAT = "tinyseg 1"
TEXT = "__description__"  # the JSON text among the arrays, as bytes


def fingerprint(arrays: Mapping[str, np.ndarray], description: dict) -> str:
    """SHA-256 of all that a file says: its description, and each array's name, type, shape, values.

    The archive's own checksums leave a gap: a damaged shape that is too small reads only a part of
    the array, and a part is compared with nothing.
    """
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write(path: str | Path, arrays: Mapping[str, Array], description: dict) -> None:
    """Write arrays and a JSON-able description to `path` (.npz).

    Raises OSError where that fails; what stood at `path` before is then untouched.
    """
    path = Path(path)
    description = json.loads(json.dumps(description))  # as `read` will find it
    content = {name: np.asarray(to_numpy(array)) for name, array in arrays.items()}
    text = json.dumps({"format": FORMAT, "arrays": list(content),
                       "sha256": fingerprint(content, description), **description}).encode()
    with whole(path) as draft, open(draft, "wb") as file:
        np.savez(file, allow_pickle=False, **{TEXT: np.frombuffer(text, np.uint8), **content})


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, description) of a file that `write` made; ValueError names a file that is not."""
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
    """Write a network that has a `config` (a `resnet_seg` or `resnet`, inflated or not).

    `metadata` is JSON-able; with `net.metadata` it comes back as `load(path).metadata`.
    """
    if not hasattr(net, "config"):
        raise ValueError(f"{type(net).__name__} has no config to rebuild it from")
    kept = {**getattr(net, "metadata", {}), **metadata}
    write(path, net.state(), {"architecture": net.config, "metadata": kept})


def load(path: str | Path) -> Module:
    """The network in a file that `save` made, in evaluation mode, on the CPU, with `.metadata`.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    arrays, description = read(path)
    try:
        config = description["architecture"]
        claimed = config["in_channels"], config["classes"]
        last = "fc.bias" if "fc.bias" in arrays else "classifier.4.bias"
        held = arrays["conv1.weight"].shape[-2], len(arrays[last])
        if claimed != held:  # before a network of the claimed size is made
            raise ValueError(f"{claimed} input channels and classes are claimed, {held} found")
        dtypes = {a.dtype for a in arrays.values()}
        if any(d.kind != "f" for d in dtypes):
            raise ValueError(f"expected arrays of floating-point numbers, found {dtypes}")
        net = models.build(config)
        if len(dtypes) == 1:
            net.astype(str(dtypes.pop()))
        net.load_state(arrays)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: holds no network that can be rebuilt ({error})") from None
    net.metadata = description.get("metadata", {})
    return net.eval()

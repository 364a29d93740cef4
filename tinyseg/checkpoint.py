"""Our own files: one .npz with all arrays and one JSON text, written whole or not at all.

A network file holds the architecture (`net.config`), the state and any metadata, so that `load`
rebuilds the network from the file alone. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import models
from .backend import Array, to_numpy
from .data.nifti import whole
from .nn import Module

FORMAT = "tinyseg 1"
TEXT = "__description__"  # the JSON text among the arrays, as bytes


def write(path: str | Path, arrays: Mapping[str, Array], description: dict) -> None:
    """Write arrays and a JSON-able description to `path` (.npz).

    Raises OSError where that fails; what stood at `path` before is then untouched.
    """
    path = Path(path)
    text = json.dumps({"format": FORMAT, **description}).encode()
    content = {TEXT: np.frombuffer(text, np.uint8),
               **{name: to_numpy(array) for name, array in arrays.items()}}
    with whole(path) as draft, open(draft, "wb") as file:
        np.savez(file, allow_pickle=False, **content)


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, description) of a file that `write` made; ValueError names a file that is not."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(arrays.pop(TEXT).tobytes())
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}, expected {FORMAT!r}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a complete tinyseg checkpoint ({error})") from None
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
        net = models.build(description["architecture"])
        dtypes = {str(a.dtype) for a in arrays.values()}
        if len(dtypes) == 1:
            net.astype(dtypes.pop())
        net.load_state(arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    net.metadata = description.get("metadata", {})
    return net.eval()

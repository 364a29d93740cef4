"""Where a network stands in a file: the prefix of its names, the names of its parts.

The prefix ("module.", "backbone.", "online_network.encoder.") is the one under which most of the
network's names are found. What stands elsewhere is not the network's, but for a head: that may
stand beside its backbone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from os.path import commonprefix

import numpy as np

from .. import models

HEADS = tuple(sorted({f"{name}." for head in models.HEADS.values() for name in head.names}))
NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4",
            "9": "fc"}  # the children of a torchvision ResNet, as RadImageNet has them
Renames = Mapping[str, str] | Iterable[tuple[str, str]]


def first(names: Iterable[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(list(names)[:3]) or "none"


def by_number(name: str) -> str:
    """The name of a part of a ResNet that goes by the number of a child."""
    child, _, rest = name.partition(".")
    return f"{NUMBERED.get(child, child)}.{rest}"


def prefixes(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """The prefixes, "" or "a.b.", under which the most of the `wanted` names stand; at most 8."""
    counts: Counter[str] = Counter()
    for name in names:
        prefix, rest = "", name
        for _ in range(9):
            if rest in wanted or by_number(rest) in wanted:
                counts[prefix] += 1
            part, dot, rest = rest.partition(".")
            prefix += part + dot
    most = max(counts.values(), default=0)
    return [prefix for prefix, n in counts.items() if n == most][:8] or [""]


def under(prefix: str, names: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """{name without the prefix: name in the file}; names elsewhere are kept, but for a head that
    shares a part of the prefix only, and none of its own under it: "module.fc.weight" beside
    "module.encoder.conv1.weight"."""
    inside = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    numbered = {name: by_number(short) for name, short in inside.items()}
    if sum(n in wanted for n in numbered.values()) > sum(n in wanted for n in inside.values()):
        inside = numbered
    found: dict[str, str] = {}
    for name, short in inside.items():
        found[name if short in found else short] = name
    for name in names:
        if name in inside:
            continue
        parts = name.split(".")
        short = ".".join(parts[len(commonprefix([parts, prefix.split(".")])):])
        found[short if short.startswith(HEADS) and short not in found else name] = name
    return found


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name is wholly matched by one of the regular expressions (or by the one)."""
    compiled = [_compiled(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    return lambda name: any(pattern.fullmatch(name) for pattern in compiled)


def renamed(arrays: Mapping[str, np.ndarray], rename: Renames = ()) -> dict[str, np.ndarray]:
    """The arrays under their names after `rename` (see mapping.load), without counters."""
    changes = [(_compiled(pattern), new) for pattern, new in dict(rename).items()]
    out: dict[str, np.ndarray] = {}
    for old, array in arrays.items():
        name = old
        for pattern, new in changes:
            name = pattern.sub(new, name)
        if name in out:
            raise ValueError(f"{old} and another tensor are both called {name}")
        if not name.endswith("num_batches_tracked"):
            out[name] = array
    return out


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error}); a dot stands for any "
                         'letter, as in "head.*"') from None


def places(names: Collection[str], wanted: Collection[str], prefix: str | None) -> list[str]:
    """The prefix that was asked for, or all that fit alike."""
    if not prefix:
        return prefixes(names, wanted) if prefix is None else [""]
    prefix = prefix.removesuffix(".") + "."
    if not any(name.startswith(prefix) for name in names):
        raise ValueError(f"no name begins with {prefix}; the first names are {first(names)}")
    return [prefix]


def choose(found: Iterable[str]) -> str:
    """What to say where a network stands under several prefixes."""
    named = [f'"{prefix}"' for prefix in found]
    return (f"the network's names stand under {' and '.join(named)}: say which is meant, as in "
            f"prefix={named[-1]}")

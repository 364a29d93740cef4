"""Left and right: which classes change places in a mirror image, read from their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

LEFT_RIGHT = -1
SIDES = {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "左": "右"}  # words, mirrored
SIDES |= {right: left for left, right in SIDES.items()}
LETTERS = str.maketrans("lrLR", "rlRL")
CHAMBERS = {"heart", "atrium", "ventricle", "cavity"}  # whose left and right are no mirror images
WORDS = re.compile(  # of a class name; L1 is one, a vertebra
    r"(?:left|right|Left|Right)(?=[a-z])|[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*|[^\W_a-zA-Z]")


def sides(names: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Which class names are each other's mirror image, in pairs; and which have a side, or may have
    one, and no partner.

    A side is a word of its own, set apart ("left kidney", "kidney_L", "R-Parotid"), begun by a
    capital ("LeftParotid") or before all others ("leftkidney"); two names are a pair that differ in
    the sides alone, but for the heart's chambers. Names that one letter tells apart, l or r (lkid
    and rkid), may have a side: no partner is guessed.

    >>> ts.data.augment.sides(["left kidney", "right kidney", "lung_R", "liver"])
    ([('left kidney', 'right kidney')], ['lung_R'])
    """
    names = list(names)
    words = {name: tuple(word.lower() for word in WORDS.findall(name)) for name in names}
    alike = Counter(words.values())
    named = {found: name for name, found in words.items() if alike[found] == 1}
    pairs: list[tuple[str, str]] = []
    alone = []
    for name, found in words.items():
        mirrored = tuple(SIDES.get(word, word) for word in found)
        partner = named.get(mirrored)
        if mirrored == found:
            exchanged = {name[:i] + name[i].translate(LETTERS) + name[i + 1 :]
                         for i in range(len(name)) if name[i] in "lrLR"} - {name}
            if exchanged & set(names):
                alone.append(name)
        elif partner is None or alike[found] > 1 or set(found) - SIDES.keys() <= CHAMBERS:
            alone.append(name)
        elif (partner, name) not in pairs:
            pairs.append((name, partner))
    return pairs, alone


def numbered(pairs: Iterable[Sequence[str]], names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of class names as pairs of classes, their places in `names`; ValueError for another
    name, and for one that is named twice.

    >>> names = ["background", "left kidney", "right kidney"]
    >>> ts.data.augment.numbered([("left kidney", "right kidney")], names)
    [(1, 2)]
    """
    pairs = [tuple(pair) for pair in pairs]
    each = [name for pair in pairs for name in pair]
    if strange := [name for name in each if name not in names]:
        raise ValueError(f"found the class {strange[0]!r} in a pair of left and right, expected"
                         f" one of {list(names)}")
    if twice := [name for name in each if each.count(name) > 1]:
        raise ValueError(f"found the class {twice[0]!r} twice among the pairs of left and right,"
                         " expected every class once")
    return [(names.index(a), names.index(b)) for a, b in pairs]


def permutation(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """(count,) the numbers from 0, those of each pair in each other's place.

    >>> ts.data.augment.permutation(4, [(1, 2)]).tolist()
    [0, 2, 1, 3]
    """
    order = np.arange(count)
    for a, b in pairs:
        order[[a, b]] = b, a
    return order

"""Pictures for lessons: each draws arrays, or what they came from, to a file that `path` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .backend import to_numpy
from .graph import Node
from .report import COLOURS, new_figure, write_figure
from .tensor import Tensor


def flow(root: Tensor, g: np.ndarray | None = None) -> list[tuple[Any, Any, float]]:
    """Go backward from `root` (see Tensor.backward), and tell what went along every edge: (vertex,
    the one before it, the gradient's number where it is one, its norm otherwise). A vertex is a
    `Node`, which knows its operation's `name`, or a leaf."""
    edges: list[tuple[Any, Any, float]] = []

    def told(node: Node, parent: Any, answer: Any) -> Any:
        pulled = to_numpy(answer)
        edges.append((node, parent, float(pulled.sum() if pulled.size == 1 else
                                          np.linalg.norm(pulled))))
        return answer

    def one(node: Node, parent: Any, pull: Any, g: Any) -> Any:
        return told(node, parent, pull(g))

    def together(node: Node, parents: list, pull: Any, g: Any) -> Any:
        answers = pull(g)
        for parent, i in parents:
            told(node, parent, answers[i])
        return answers

    seen: set = set()
    waiting = [root.node] if isinstance(root.node, Node) else []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.edges if isinstance(parent, Node)]
        node.pull = (partial(together, node, node.edges, node.pull) if callable(node.pull) else
                     [partial(one, node, parent, pull)
                      for (parent, _), pull in zip(node.edges, node.pull, strict=True)])
    root.backward(g)
    return edges


def graph(path: str | Path, root: Tensor, names: Mapping[str, Tensor] | None = None,
          g: np.ndarray | None = None) -> None:
    """The graph behind a tensor, from its leaves on the left to `root`: operations by name, leaves
    and what else is in `names` by theirs, and on every edge the gradient that `backward` sends
    along it, the wider the larger. It goes backward: leaves have their gradients then, and the
    graph is used up."""
    edges = flow(root, g)
    called = {id(t.node or t): name for name, t in (names or {}).items()}
    level: dict[Any, int] = {}
    for node, parent, _ in reversed(edges):  # what comes first is pulled back last
        level[node] = max(level.get(node, 1), level.setdefault(parent, 0) + 1)
    for parent in [v for v in level if not isinstance(v, Node)]:  # leaves stand by their use
        level[parent] = min(level[node] for node, before, _ in edges if before is parent) - 1
    columns: dict[int, list] = {}
    for vertex in level:
        columns.setdefault(level[vertex], []).append(vertex)
    place = {vertex: (x, i - (len(column) - 1) / 2) for x, column in columns.items()
             for i, vertex in enumerate(column)}
    most = max((abs(size) for *_, size in edges), default=1.0) or 1.0
    figure = new_figure(1.6 + 1.5 * len(columns),
                        1 + 0.9 * max(map(len, columns.values()), default=1))
    panel = figure.subplots()
    panel.set_axis_off()
    bends: dict[tuple, int] = {}
    for node, parent, size in edges:
        (x0, y0), (x1, y1) = place[parent], place[node]
        bends[parent, node] = bend = bends.get((parent, node), -1) + 1  # a value used twice
        panel.annotate("", (x1, y1), (x0, y0), arrowprops={
            "arrowstyle": "-", "linewidth": 0.6 + 6 * abs(size) / most, "color": COLOURS[2],
            "alpha": 0.6, "connectionstyle": f"arc3,rad={0.25 * bend}"})
        panel.text(x0 + 0.45 * (x1 - x0), y0 + 0.45 * (y1 - y0) + 0.27 * bend, f"{size:.3g}",
                   ha="center", va="center", fontsize="small",
                   bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none",
                         "alpha": 0.85})
    for vertex, (x, y) in place.items():
        node = isinstance(vertex, Node)
        text = called.get(id(vertex), "" if node else "leaf")
        text = " = ".join(filter(None, (text, vertex.name if node else "")))
        if vertex.shape:
            text += "\n" + "x".join(map(str, vertex.shape))
        panel.text(x, y, text, ha="center", va="center", bbox={
            "boxstyle": "round" if node else "square", "facecolor": "white" if node else "#fff1cc",
            "edgecolor": "black", "linewidth": 0.8})
    panel.set_xlim(-0.6, max(columns, default=0) + 0.6)
    heights = [y for _, y in place.values()] or [0.0]
    panel.set_ylim(max(heights) + 0.6, min(heights) - 0.6)
    write_figure(figure, path)


def field(path: str | Path, share: np.ndarray, points: np.ndarray, which: np.ndarray,
          extent: tuple[float, float, float, float]) -> None:
    """What a network says of a plane, share (H, W) of the second class from 0 to 1, over `extent`
    (left, right, bottom, top), and points (N, 2) of two classes, `which` (N,) 0 or 1."""
    figure = new_figure(6, 4)
    panel = figure.subplots()
    panel.imshow(share, origin="lower", extent=extent, cmap="cividis", vmin=0, vmax=1,
                 aspect="auto")
    panel.contour(share, [0.5], extent=extent, colors="white", linewidths=1.5)
    for number, (colour, marker) in enumerate(((COLOURS[0], "o"), (COLOURS[6], "^"))):
        panel.scatter(*points[which == number].T, s=18, color=colour, marker=marker,
                      edgecolors="black", linewidths=0.5)
    write_figure(figure, path)


def columns(path: str | Path, x: np.ndarray, w: np.ndarray, at: tuple[int, ...]) -> None:
    """How a convolution becomes one product: what the window at position `at` sees of x (*S), one
    channel, is a row of the columns; that row times the kernel w (*K) as a column is one number of
    the answer. Ranks 2 and 3; of a volume the slices are shown that the window sees."""
    kernel, rank = w.shape, x.ndim
    positions = tuple(n - k + 1 for n, k in zip(x.shape, kernel, strict=True))
    rows = np.lib.stride_tricks.sliding_window_view(x, kernel).reshape(prod(positions), -1)
    answer, row = rows @ w.ravel(), int(np.ravel_multi_index(at, positions))
    slices = [x] if rank == 2 else [x[at[0] + t] for t in range(kernel[0])]
    widths = [1.0] * len(slices) + [1.4, 0.35, 1.0]
    figure = new_figure(2.3 * sum(widths) / 1.2, 3.4)
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for t, (panel, image) in enumerate(zip(panels, slices, strict=False)):
        _framed(panel, image, (at[-2], at[-1], *kernel[-2:]))
        panel.set_title("the input" if rank == 2 else f"slice {at[0] + t}", fontsize="small")
    matrix, column, product = panels[len(slices) :]
    _framed(matrix, rows, (row, 0, 1, rows.shape[1]))
    matrix.set_title(f"columns {rows.shape[0]} x {rows.shape[1]}", fontsize="small")
    matrix.set_aspect("auto")
    _framed(column, w.reshape(-1, 1), (0, 0, w.size, 1))
    column.set_title("kernel", fontsize="small")
    shown = answer.reshape(positions) if rank == 2 else answer.reshape(positions)[at[0]]
    _framed(product, shown, (at[-2], at[-1], 1, 1))
    product.set_title(f"the answer, {answer[row]:.2f} here", fontsize="small")
    write_figure(figure, path)


def _framed(panel: Any, numbers: np.ndarray, frame: tuple[int, ...]) -> None:
    """Numbers (H, W) as a picture, with a frame (top, left, height, width) around some of them."""
    from matplotlib.patches import Rectangle

    most = abs(numbers).max() or 1.0
    panel.imshow(numbers, cmap="RdBu_r", vmin=-most, vmax=most)
    panel.set(xticks=[], yticks=[])
    top, left, height, width = frame
    panel.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False,
                              edgecolor="black", linewidth=2, clip_on=False))


def table(path: str | Path, rows: Mapping[str, Sequence[float]], what: str = "") -> None:
    """Numbers from 0 as colours and as text, a row of them after each name; `what` they count."""
    numbers = np.array(list(rows.values()))
    figure = new_figure(2 + 0.75 * numbers.shape[1], 0.9 + 0.42 * len(numbers))
    panel = figure.subplots()
    panel.imshow(numbers, cmap="Greys", vmin=0, vmax=1.6 * numbers.max() or 1.0, aspect="auto")
    for (i, j), number in np.ndenumerate(numbers):
        panel.text(j, i, f"{number:.2g}", ha="center", va="center", fontsize="small")
    panel.set_yticks(range(len(numbers)), list(rows))
    panel.set_xticks(range(numbers.shape[1]))
    panel.set_xlabel(what)
    panel.tick_params(length=0)
    write_figure(figure, path)


def maps(path: str | Path, named: Mapping[str, np.ndarray]) -> None:
    """Maps (H, W) of numbers from 0 side by side, each from its least to its largest: feature maps,
    influences, probabilities."""
    figure = new_figure(2.6 * len(named), 2.9)
    panels = figure.subplots(1, len(named), squeeze=False)[0]
    for panel, (name, numbers) in zip(panels, named.items(), strict=True):
        panel.imshow(np.sqrt(numbers - numbers.min()), cmap="cividis")  # small ones show too
        panel.set_title(name, fontsize="small")
        panel.set(xticks=[], yticks=[])
    write_figure(figure, path)

"""Pictures for lessons: what goes along the edges of a graph, and that the files are pictures."""

import numpy as np
import pytest

import tinyseg as ts
from tinyseg import Tensor, ops, page, pictures
from tinyseg.tensor import op


def leaf(value):
    return Tensor(np.array(value, "float64"), requires_grad=True)


@op
def both(x, y):
    """One pull-back for both inputs."""
    return x * y, lambda g, wanted: (g * y, g * x)


def test_every_path_carries_the_product_of_its_slopes():
    """Of z = x y + x²: edges into x carry y, x and x, and these add up to its gradient."""
    for product in (lambda a, b: a * b, both):
        x, y = leaf(3), leaf(-0.5)
        z = product(x, y) + x * x
        edges = pictures.flow(z)
        arriving = sorted(size for _, before, size in edges if before is x)
        assert arriving == [-0.5, 3, 3] and x.grad == sum(arriving)
        assert [size for _, before, size in edges if before is y] == [3] == [y.grad]
        assert sorted(node.name for node, *_ in edges).count("add") == 2


def test_of_arrays_the_norm_is_told():
    x, g = leaf([[1.0, -2.0, 3.0]]), np.array([[3.0, 0.0, 4.0]])
    (node, before, size), = pictures.flow(ops.relu(x), g)
    assert (node.name, before, size) == ("relu", x, 5)
    np.testing.assert_array_equal(x.grad, [[3, 0, 4]])
    assert pictures.flow(leaf(2.0)) == []  # a leaf alone has no edge


def test_pictures_are_written(tmp_path):
    x, w = leaf(3), leaf(-0.5)
    pictures.graph(tmp_path / "graph.png", ops.tanh(x * w) * x + x * x, {"x": x, "w": w})
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert x.grad == pytest.approx(4.8238, abs=1e-4)
    svg = page.figure(pictures.graph, leaf(2) * leaf(5), {})
    assert svg._repr_html_() == svg and svg.startswith("<figure><svg")
    share = np.linspace(0, 1, 12).reshape(3, 4)
    pictures.field(tmp_path / "field.svg", share, np.zeros((5, 2)), np.arange(5) % 2,
                   (0, 1, 0, 1))
    assert "<svg" in (tmp_path / "field.svg").read_text("utf-8")
    assert ts.pictures is pictures


@pytest.mark.parametrize("shape, kernel, at", [((6, 8), (3, 2), (1, 4)),
                                               ((4, 6, 8), (3, 2, 3), (1, 2, 3))])
def test_columns_are_a_row_for_each_window(tmp_path, monkeypatch, shape, kernel, at):
    """The row in the frame is what the window sees, and the number in the frame its product."""
    rng = np.random.default_rng(0)
    x, w, shown = rng.standard_normal(shape), rng.standard_normal(kernel), []
    draw = pictures._framed
    monkeypatch.setattr(pictures, "_framed", lambda panel, numbers, frame: (
        shown.append((numbers, frame)), draw(panel, numbers, frame)))
    pictures.columns(tmp_path / "columns.png", x, w, at)
    *slices, (rows, (row, *_)), (column, _), (answer, (i, j, *_)) = shown
    seen = x[tuple(slice(a, a + k) for a, k in zip(at, kernel, strict=True))]
    np.testing.assert_array_equal(rows[row], seen.ravel())
    np.testing.assert_array_equal(column[:, 0], w.ravel())
    assert answer[i, j] == pytest.approx((seen * w).sum())
    assert len(slices) == (kernel[0] if len(shape) == 3 else 1)
    top, left, height, width = slices[0][1]
    np.testing.assert_array_equal(slices[0][0][top : top + height, left : left + width],
                                  seen if len(shape) == 2 else seen[0])

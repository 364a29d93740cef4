"""Convolutions drawn by hypothesis, for the tests of every body that computes them."""

import numpy as np
from hypothesis import strategies as st

from tinyseg.windows import Window


def arrays(size, batch, channels, filters, kernel, seed):
    """An input (N, *S, C_in) and a kernel (*K, C_in, C_out), normal, float32."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((batch, *size, channels), "float32"),
            rng.standard_normal((*kernel, channels, filters), "float32"))


@st.composite
def placed(draw, rank, size, dilation, padding):
    """(size, window): kernel, stride, dilation, padding and border drawn per axis; `size`,
    `dilation` and `padding` are the largest."""
    rank = draw(st.integers(1, rank))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, dilation = each(1, 3), each(1, dilation)
    padding = tuple(draw(st.tuples(*[st.integers(0, padding)] * 2)) for _ in range(rank))
    edge = tuple(draw(st.sampled_from(["zero", "zero", "edge"])) for _ in range(rank))
    size = tuple(max(n, d * (k - 1) + 1 - sum(p)) for n, k, d, p in
                 zip(each(1, size), kernel, dilation, padding, strict=True))
    return size, Window.of(kernel, each(1, 3), padding, dilation, edge)

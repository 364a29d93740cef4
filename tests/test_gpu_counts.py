"""benchmarks/gpu_counts.py: what it counts is what the emulator of CUDA multiplies."""

import sys
from pathlib import Path
from unittest import mock

import emulator
import numpy as np
import pytest
from convolutions import arrays

from tinyseg import windows
from tinyseg.cuda import loader
from tinyseg.windows import Window, kernels

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_counts  # noqa: E402


@pytest.mark.parametrize("size, channels, filters, kernel, options", [
    ((3, 9, 11), 40, 72, (3, 3, 3), {"padding": 4, "dilation": 4}),
    ((5, 13, 12), 8, 24, (3, 3, 3), {"padding": 1, "stride": 2}),
    ((1, 24, 25), 64, 40, (3, 3, 3), {"padding": 1}),
    ((4, 9, 10), 3, 16, (3, 5, 5), {"padding": 2, "stride": (1, 2, 2)}),  # number by number
])
def test_fragments(cuda, size, channels, filters, kernel, options):
    window, total, compiled = Window.of(kernel, **options), np.zeros(2, "int64"), loader._function
    x, w = (cuda.asarray(a) for a in arrays(size, 2, channels, filters, kernel, 1))

    def counting(library, file, name, constants):
        function = compiled(library, file, name, constants)

        def call(grid, block, passed, shared_mem):
            if file == "conv_mma":
                for problem in passed[3].view(kernels.GEOMETRY):
                    total[:] += gpu_counts.fragments(name, grid, problem, dict(constants))
            function(grid, block, passed, shared_mem=shared_mem)

        call.max_dynamic_shared_size_bytes = 48 << 10
        function.max_dynamic_shared_size_bytes = loader.SHARED_LIMIT
        return call

    emulator.statistics.clear()
    with mock.patch.object(loader, "_function", counting):
        y = windows.correlate(x, w, window)
        windows.correlate_dx(y, w, size, window)
        windows.correlate_dw(x, y, window)
    multiplied = sum(emulator.statistics[name]["multiplications"]
                     for name in ("correlate", "correlate_dw"))
    assert total[0] == multiplied > 0 and total[0] <= total[1]


def test_the_table_is_what_the_program_counts():
    """And a step of ResNet-18 stays within its launches, reads by the host and products."""
    kept = (ROOT / "benchmarks/results/gpu/counts.md").read_text("utf-8")
    assert gpu_counts.table() == kept, "run python benchmarks/gpu_counts.py"
    launches, in_bf16, others, reads, _, share = (
        float(cell.split()[0]) for cell in kept.splitlines()[2].split("|")[2:-1])
    assert launches + others <= 211 and reads == 1 and share <= 0.57
    assert launches < in_bf16 <= 284

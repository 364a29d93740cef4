"""What NVIDIA's compiler makes of the kernels that multiply: registers and instructions, no GPU.

Each body of kernels/conv_mma.cu that the library compiles, for an A100 (sm_80) and an H100 (sm_90):
the instructions of its main loop, which holds every product of tensor cores (mma: of eight terms in
TF32, of sixteen in bf16), and those before and behind it, which a block runs at most once for each
of its taps, rows or outputs. Instructions are counted as they stand in the code, loops once.

  python benchmarks/gpu_instructions.py       writes benchmarks/results/gpu/instructions.md

Needs pip install "nvidia-cuda-nvrtc>=13" nvidia-cuda-nvdisasm, and no driver.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do

from gpu_counts import keep  # noqa: E402

from tinyseg.cuda import loader  # noqa: E402
from tinyseg.windows.kernels import BF16, tile  # noqa: E402

PACKAGES = "nvidia-cuda-nvrtc", "nvidia-cuda-nvdisasm"
ARCHITECTURES = "sm_80", "sm_90"
BODIES = [{**tile(columns), "CHUNK": chunk, "SWAPPED": swapped, "PROBLEMS": problems,
           "NUMBER": number}
          for number, chunk, swapped, problems in (
              ("float", 1, 0, 1), ("float", 4, 0, 1), ("float", 4, 1, 1), ("float", 4, 1, 8),
              (BF16, 8, 0, 1), (BF16, 8, 1, 1), (BF16, 8, 1, 8)) for columns in (64, 128)]


def found(pattern: str) -> Path | None:
    """A file of NVIDIA's packages from PyPI."""
    spec = importlib.util.find_spec("nvidia")
    return next((path for place in (spec.submodule_search_locations if spec else ())
                 for path in sorted(Path(place).glob(pattern))), None)


def nvrtc() -> Path | None:
    """The runtime compiler, which needs neither a GPU nor a driver."""
    return found("*/lib/libnvrtc.so.*")


def nvdisasm() -> Path | None:
    """The program that reads what was compiled."""
    return found("*/bin/nvdisasm")


def compiled(code: str, *options: str) -> tuple[str, bytes]:
    """The log and the binary of a compilation, with what CuPy adds to the options; AssertionError
    with the log if it fails."""
    library = ctypes.CDLL(str(nvrtc()))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None,
                                      None) == 0
    options = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space",
               "--ptxas-options=-v", *options)
    failed = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    given = []
    for what in "ProgramLog", "CUBIN":
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        given.append(ctypes.create_string_buffer(size.value))
        getattr(library, f"nvrtcGet{what}")(program, given[-1])
    library.nvrtcDestroyProgram(ctypes.byref(program))
    log, binary = given
    assert not failed, log.value.decode()
    return log.value.decode(), binary.raw


class Body(NamedTuple):
    """Instructions of a kernel, by where they stand."""

    before: int
    loop: int
    mma: int
    behind: int


def bodies(binary: bytes) -> dict[str, Body]:
    """{kernel: its instructions}, of kernels with one loop that holds all of their products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([str(nvdisasm()), "-c", file.name], check=True, text=True,
                              stdout=subprocess.PIPE).stdout
    kernels = {}
    for part in re.split(r"^\.text\.(?=\w+:$)", text, flags=re.MULTILINE)[1:]:
        name, _, code = part.partition(":")
        labels: dict[str, int] = {}
        lines: list[str] = []
        for line in code.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*(.*);", line):
                lines.append(instruction[1])
        end = max((i for i, line in enumerate(lines) if line.startswith("EXIT")), default=0)
        products = [i for i, line in enumerate(lines) if line.startswith("HMMA")]
        loops = [(labels[jump[1]], i + 1) for i, line in enumerate(lines)
                 if (jump := re.match(r"BRA.*\(?(\.L_\w+)", line)) and labels[jump[1]] <= i]
        first, last = min(((a, b) for a, b in loops if all(a <= i < b for i in products)),
                          key=lambda ends: ends[1] - ends[0])
        kernels[name] = Body(first, last - first, len(products), end + 1 - last)
    return kernels


def registers(log: str) -> dict[str, int]:
    """{kernel: registers of a thread}, of a compilation's log."""
    return {kernel: int(number) for kernel, number in re.findall(
        r"Compiling entry function '(\w+)' for.*?Used (\d+) registers", log, flags=re.DOTALL)}


def table() -> str:
    """All counts, in Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    head = ("kernel", "factors", "columns", "numbers a load", "w transposed", "problems", "for",
            "registers", "before", "loop", "mma", "others a mma", "behind")
    lines = [versions, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for constants, arch in product(BODIES, ARCHITECTURES):
        log, binary = compiled(loader.source("conv_mma"), f"-arch={arch}",
                               *(f"-D{name}={value}" for name, value in constants.items()))
        used = registers(log)
        for kernel, body in sorted(bodies(binary).items()):
            if kernel == "correlate_dw" and constants["SWAPPED"]:
                continue  # it knows no w
            lines.append(
                f"| {kernel} | {'bf16' if constants['NUMBER'] == BF16 else 'TF32'} | "
                f"{constants['COLUMNS']} | {constants['CHUNK']} | "
                f"{'yes' if constants['SWAPPED'] else 'no'} | {constants['PROBLEMS']} | {arch} | "
                f"{used[kernel]} | {body.before} | {body.loop} | {body.mma} | "
                f"{(body.loop - body.mma) / body.mma:.2f} | {body.behind} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(keep(table, "instructions.md", __doc__, missing="" if nvrtc() and nvdisasm() else
                  f"found no {' and '.join(PACKAGES)}; pip install them"))

"""The tables of benchmarks/gpu.py, in Markdown: `report` of its Record."""

from __future__ import annotations

from math import exp, isnan, log, nan

TARGETS = {"forward": 0.8, "dx": 0.75, "dw": 0.65}  # cuDNN's time / ours, at equal dtype, layout
LAYOUTS = {"channels_last": "channels_last_3d", "default": "default"}
SIDES = {"ours": "tinyseg TF32", "captured": "tinyseg TF32, captured",
         **{side: f"PyTorch TF32 {layout}" for side, layout in LAYOUTS.items()},
         "channels_last captured": "PyTorch TF32 channels_last_3d, captured",
         "amp": "PyTorch bf16 AMP channels_last_3d",
         "amp captured": "PyTorch bf16 AMP channels_last_3d, captured",
         "bf16": "tinyseg bf16", "bf16 captured": "tinyseg bf16, captured"}


def geometric_mean(numbers) -> float:
    """Of those that are known; NaN of none."""
    logs = [log(n) for n in numbers if not isnan(n)]
    return exp(sum(logs) / len(logs)) if logs else nan


def ratio(row: dict, side: str) -> float:
    """How often our time fits into that of a side; NaN where the side was not measured."""
    return row.get(side, nan) / row["ours"]


def throughput(rows: list[dict], network: str) -> float:
    """Ours, over all layers of a network, as often as each occurs."""
    took = [row["ours"] * row[network] for row in rows]
    done = sum(t * row["rate"] for t, row in zip(took, rows, strict=True))
    return done / sum(took) if took else nan


def table(*rows) -> str:
    """Rows, the first of them the heading, as Markdown; nothing without a second."""
    lines = ["| " + " | ".join(map(str, row)) + " |\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]]) if rows[1:] else ""


def layer_table(record) -> str:
    """The layers of each network beside cuDNN; in a mean each distinct one counts once."""
    rows = []
    for case, precision in dict.fromkeys((r["case"], r["precision"]) for r in record.of("layers")):
        for network in ("resnet18", "resnet50"):
            found = [[r for r in record.of("layers", case=case, precision=precision, direction=d)
                      if r[network]] for d in TARGETS]
            head = f"{network}, {case}, {precision}", len(found[0])
            for s, layout in LAYOUTS.items():
                means = (geometric_mean(ratio(r, s) for r in f) for f in found)
                rows.append((*head, f"cuDNN ({layout}) / ours", *(f"{m:.2f}" for m in means)))
            rows.append((*head, "ours, TFLOP/s", *(f"{throughput(f, network):.0f}" for f in found)))
    goal = "", "", "target", *(f"{t:.2f}" for t in TARGETS.values())
    return table(("convolutions", "layers", "time", *TARGETS), *rows, goal) if rows else ""


def side_by_side(title: str, rows: list[dict]) -> str:
    """Whole networks beside PyTorch, one to a column: milliseconds, how much ours in TF32 is faster
    (each beside ours that is run the same way, captured or not), GiB reserved."""
    def cell(row, side):
        if isnan(row.get(side, nan)):
            return "not measured"
        mine = "captured" if side.endswith("captured") else "ours"
        beside = "" if side == mine or mine not in row else f" ({row[side] / row[mine]:.2f})"
        gib = f"{side}_gib"
        return f"{row[side]:.1f} ms{beside}" + (f", {row[gib]:.1f} GiB" if gib in row else "")

    merged: dict = {}
    for row in rows:  # PyTorch's captured steps stand in rows of their own
        merged.setdefault((row["what"], row["case"]), {}).update(row)
    rows = list(merged.values())
    return table((title, *(f"{row['what']}, {row['case']}" for row in rows)), *(
        (name, *(cell(row, side) for row in rows))
        for side, name in SIDES.items() if any(side in row for row in rows))) if rows else ""


def report(record) -> str:
    """All tables, of what was measured."""
    peaks = record.of("peaks")
    copy = next((row["rate"] for row in peaks if row["unit"] == "GB/s"), nan)
    texts = [
        table(("peak", "measured"), *((r["what"], f"{r['rate']:.0f} {r['unit']}") for r in peaks)),
        *(side_by_side(part, record.of(part)) for part in ("steps", "inference")),
        table(("a step's kernels", "launches", "ms"), *(
            (r["what"], r["launches"], f"{r['ours']:.2f}") for r in record.of("kernels"))),
        layer_table(record),
        table(("tiles of a convolution", "", "constants", "ms", "cuDNN / ours"), *(
            (r["what"], r["direction"], r["note"], f"{r['ours']:.3f}",
             f"{ratio(r, 'channels_last'):.2f}") for r in record.of("tiles"))),
        table(("forward, fp32, ms", "ours", "im2col", "cuDNN channels_last_3d"), *(
            (r["what"], *(f"{r.get(s, nan):.3f}" for s in ("ours", "im2col", "channels_last")))
            for r in record.of("layers") if "im2col" in r)),
        table(("bound by memory", "", "tinyseg", "of a copy", "PyTorch / tinyseg"), *(
            (r["what"], r["direction"], f"{r['rate']:.0f} GB/s", f"{r['rate'] / copy:.2f}",
             ", ".join(f"{ratio(r, s):.2f}" for s in LAYOUTS if s in r))
            for r in record.of("memory")))]
    return "\n".join(filter(None, texts))

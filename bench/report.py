"""Tables (Markdown) and plots of a folder of results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.summary import Row

# The largest relative error of a right gradient; rounding to its dtype and fp32 sums cause less.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
# Operations whose times are bounds for that of a loss.
ALONE = ("copy", "add", "read", "gemms")
CASE = ("n", "v", "d", "dtype", "divergence", "inputs")


def is_right(row: Row) -> bool:
    """Whether the gradient of a row is precise enough to show its times."""
    return row["grad_error"] is None or row["grad_error"] <= TOLERANCE[row["dtype"]]


def render(folder: Path) -> str:
    """Returns the tables of a folder as Markdown; writes them and the plots to it."""
    rows: list[Row] = json.loads((folder / "summary.json").read_text())
    stamp = json.loads((folder / "raw.json").read_text())["machine_info"]["hybrid_kernels"]
    right = [row for row in rows if is_right(row)]
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("torch", "triton"))
    lines = [f"{stamp['device']}, {versions}, commit {rows[0]['commit'][:10]}", *tables(right)]
    lines += ["", *wrong(rows), *_left_out(stamp)]
    if any(row["op"] == "hybrid_loss" for row in right):
        plot(folder, right)
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "report.md").write_text(text)
    return text


def tables(rows: list[Row]) -> Iterable[str]:
    """A table for each case."""
    for case in dict.fromkeys(tuple(row[key] for key in CASE) for row in rows):
        yield from table([row for row in rows if tuple(row[key] for key in CASE) == case])


def table(rows: list[Row]) -> list[str]:
    """The table of one case, with a line for each provider, relative to torch eager if it ran."""
    first = rows[0]
    sizes = f"N={first['n']:,}, V={first['v']:,}"
    sizes += f", D={first['d']:,}" if first["d"] else ""
    title = f"{sizes}, {first['dtype']}, {first['divergence']}"
    floor_title = "GEMMs alone / median" if first["d"] else "of the floor"
    memory = "peak MiB beyond gradients" if first["d"] else "peak MiB"
    added = any(row.get("add_fraction") for row in rows)
    eager = next((row for row in rows if row["provider"] == "torch eager"), None)
    lines = [
        "",
        title + (f", {first['inputs']}" if first["inputs"] else ""),
        "",
        f"| | median ms | p20-p80 | of eager | {floor_title} |{' of add |' * added} {memory} | "
        "of eager | grad error |",
        "|---|---|---|---|---|---|---|---|" + "---|" * added,
    ]
    for row in rows:
        relative = [
            ""
            if eager is None or not eager[key] or row["op"] in ALONE
            else f"{row[key] / eager[key]:.2f}"
            for key in ("median_ms", "peak_mib")
        ]
        floors = [row["floor_fraction"], *([row.get("add_fraction")] if added else [])]
        error = "" if row["grad_error"] is None else f"{row['grad_error']:.0e}"
        cells = (
            row["provider"],
            _ms(row["median_ms"]),
            f"{_ms(row['p20_ms'])}-{_ms(row['p80_ms'])}",
            relative[0],
            *("" if floor is None else f"{floor:.0%}" for floor in floors),
            f"{row['peak_mib']:.0f}",
            relative[1],
            error,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def wrong(rows: list[Row]) -> Iterable[str]:
    """A line for each row whose gradient is wrong."""
    for row in rows:
        if not is_right(row):
            case = ", ".join(str(row[key]) for key in CASE if row[key])
            yield f"- {row['provider']} ({case}): gradient error {row['grad_error']:.0e}, no result"


def _left_out(stamp: dict[str, Any]) -> Iterable[str]:
    for name, reason in stamp["missing_peers"].items():
        yield f"- {name}: not measured, {reason}"
    for case in stamp.get("out_of_time", []):
        yield f"- {case}: not measured, out of time"


def plot(folder: Path, rows: list[Row]) -> None:
    """Plots fractions of the floor, times and memory: against V, or as bars if there is one V."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    main = [row for row in _largest_family(rows) if row["op"] == "hybrid_loss"]
    first = main[0]
    ours = [
        row
        for row in rows
        if (row["provider"], row["inputs"], row["n"], row["dtype"])
        == ("hybrid_kernels", "", first["n"], first["dtype"])
    ]
    case = f"N={first['n']:,}, {first['dtype']}; time and memory: {first['divergence']}"
    if len({row["v"] for row in main}) == 1:
        case = f"V={first['v']:,}, {case}"
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    _draw(axes[0], ours, "divergence", "floor_fraction", "fraction of the floor")
    _draw(axes[1], main, "provider", "median_ms", "ms")
    _draw(axes[2], main, "provider", "peak_mib", "peak MiB above the inputs")
    figure.suptitle(case, fontsize=10)
    figure.savefig(folder / "report.png", dpi=120)
    plt.close(figure)


def _draw(axis, rows: list[Row], series: str, value: str, title: str) -> None:
    """Draws a line against V for each value of the key `series`; bars if there is one V."""
    rows = [row for row in rows if row[value] is not None]
    vocabularies = sorted({row["v"] for row in rows})
    names = list(dict.fromkeys(row[series] for row in rows))
    if len(vocabularies) == 1:
        bars = axis.barh([row[series] for row in rows], [row[value] for row in rows], 0.6)
        axis.bar_label(bars, fmt="%.2g" if value == "floor_fraction" else "%.0f", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
    else:
        for name in names:
            points = sorted((row["v"], row[value]) for row in rows if row[series] == name)
            axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set(xlabel="V", ylim=(0, 1.05 if value == "floor_fraction" else None))
        axis.set_xticks(vocabularies, [f"{v / 1000:.0f}k" for v in vocabularies])
        axis.legend(fontsize=7, frameon=False)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _largest_family(rows: list[Row]) -> list[Row]:
    """The rows with the divergence, N and dtype that have the most rows."""
    plain = [row for row in rows if not row["inputs"]]
    keys = [(row["divergence"], row["n"], row["dtype"]) for row in plain]
    best = max(dict.fromkeys(keys), key=keys.count)
    return [row for row, key in zip(plain, keys, strict=True) if key == best]

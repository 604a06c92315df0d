"""Tables (Markdown) and plots of a folder of results."""

import json
from collections.abc import Iterable
from pathlib import Path

from bench.providers import PROVIDERS
from bench.summary import Row

# The largest relative error of a gradient that counts as the right one: rounding of the entries to
# their dtype, and what fp32 arithmetic may lose.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
CASE = ("n", "v", "dtype", "divergence", "inputs")


def is_right(row: Row) -> bool:
    """Whether a row may be shown as a result."""
    return row["grad_error"] is None or row["grad_error"] <= TOLERANCE[row["dtype"]]


def render(folder: Path) -> str:
    """The tables of a folder as Markdown, and its plots as files in it."""
    rows: list[Row] = json.loads((folder / "summary.json").read_text())
    stamp = json.loads((folder / "raw.json").read_text())["machine_info"]["hybrid_kernels"]
    right = [row for row in rows if is_right(row)]
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("torch", "triton"))
    driver = f", driver {stamp['driver']}" if stamp["driver"] else ""
    lines = [f"{stamp['device']}{driver}, {versions}, commit {rows[0]['commit'][:10]}"]
    for case in dict.fromkeys(tuple(row[key] for key in CASE) for row in right):
        lines += table([row for row in right if tuple(row[key] for key in CASE) == case])
    lines += ["", *_left_out(rows, stamp["missing_peers"])]
    _plot(folder, right)
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "report.md").write_text(text)
    return text


def table(rows: list[Row]) -> list[str]:
    """One case: the same problem for every provider, relative to torch eager where it ran."""
    first = rows[0]
    title = f"N={first['n']:,}, V={first['v']:,}, {first['dtype']}, {first['divergence']}"
    eager = next((row for row in rows if row["provider"] == "torch eager"), None)
    lines = [
        "",
        title + (f", {first['inputs']}" if first["inputs"] else ""),
        "",
        "| | median ms | p20-p80 | of eager | of the floor | peak MiB | of eager | grad error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        relative = [
            "" if eager is None or row["op"] == "copy" else f"{row[key] / eager[key]:.2f}"
            for key in ("median_ms", "peak_mib")
        ]
        floor = "" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%}"
        error = "" if row["grad_error"] is None else f"{row['grad_error']:.0e}"
        cells = (
            row["provider"],
            _ms(row["median_ms"]),
            f"{_ms(row['p20_ms'])}-{_ms(row['p80_ms'])}",
            relative[0],
            floor,
            f"{row['peak_mib']:.0f}",
            relative[1],
            error,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _left_out(rows: list[Row], missing: dict[str, str]) -> Iterable[str]:
    for row in rows:
        if not is_right(row):
            case = ", ".join(str(row[key]) for key in CASE if row[key])
            yield f"- {row['provider']} ({case}): gradient error {row['grad_error']:.0e}, no result"
    for name, reason in missing.items():
        yield f"- {name}: not measured, {reason}"


def _plot(folder: Path, rows: list[Row]) -> None:
    """Fraction of the floor over V, time against peers, and memory over V."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    main = _largest_family(rows)
    vocabularies = sorted({row["v"] for row in main})
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    ours = [row for row in rows if row["provider"] == "hybrid_kernels" and not row["inputs"]]
    sizes = {(row["n"], row["dtype"]) for row in main}
    for divergence in dict.fromkeys(row["divergence"] for row in ours):
        points = [
            (row["v"], row["floor_fraction"])
            for row in ours
            if row["divergence"] == divergence
            and row["floor_fraction"] is not None
            and (row["n"], row["dtype"]) in sizes
        ]
        axes[0].plot(*zip(*sorted(points), strict=True), "o-", label=divergence)
    axes[0].axhline(1, color="grey", linewidth=0.8)
    axes[0].set(title="hybrid_kernels: fraction of the floor", xlabel="V", ylim=(0, 1.1))
    for provider in PROVIDERS:
        points = sorted(
            (row["v"], row["median_ms"], row["peak_mib"] / 1024)
            for row in main
            if row["provider"] == provider and row["op"] != "copy"
        )
        if points:
            v, times, memory = zip(*points, strict=True)
            axes[1].plot(v, times, "o-", label=provider)
            axes[2].plot(v, memory, "o-", label=provider)
    case = f"{main[0]['divergence']}, N={main[0]['n']:,}, {main[0]['dtype']}"
    axes[1].set(title=f"time, {case}", xlabel="V", ylabel="ms", ylim=(0, None))
    axes[2].set(title=f"memory, {case}", xlabel="V", ylabel="GiB above inputs", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(vocabularies, [f"{v / 1000:.0f}k" for v in vocabularies])
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(folder / "report.png", dpi=120)
    plt.close(figure)


def _largest_family(rows: list[Row]) -> list[Row]:
    """The rows of the divergence, N and dtype that have been measured most."""
    plain = [row for row in rows if not row["inputs"]]
    keys = [(row["divergence"], row["n"], row["dtype"]) for row in plain]
    best = max(dict.fromkeys(keys), key=keys.count)
    return [row for row, key in zip(plain, keys, strict=True) if key == best]

"""The results of the runs on one GPU in Markdown: `report.md`, from a folder's `results-*.jsonl`.

It combines the runs of the newest commit. If a case was measured twice, the newer result counts.
The most important tables come last, where a terminal shows them.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench import report, summary
from bench.summary import Row

# How many tunings are shown, and how many results a problem needs for a table of its own.
FASTEST, COMPARED = 8, 3
# Keys whose value may name a row.
NAMES = ("case", "tuning", "hang", "meeting", "profiled")


def parse(path: Path) -> list[Row]:
    """The rows of a run, without a last line that a stage did not finish."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def heard(rows: list[Row]) -> list[Row]:
    """The rows that a stage wrote itself, without those about compilations."""
    return [row for row in rows if "compiled" not in row and "cache" not in row]


def load(folder: Path) -> list[Row]:
    """The rows of the newest commit, oldest first, each with `device` and `commit`."""
    runs: list[list[Row]] = []
    for path in sorted(folder.glob("results-*.jsonl")):
        rows = parse(path)
        if rows and "commit" in rows[0]:
            runs.append(rows)
    if not runs:
        raise SystemExit(f"{folder} holds no results-*.jsonl with a result")
    newest = runs[-1][0]
    return [
        {"device": newest["device"], "commit": newest["commit"], **row}
        for rows in runs
        if rows[0]["commit"] == newest["commit"] and rows[0]["device"] == newest["device"]
        for row in rows
    ]


def render(folder: Path) -> str:
    """Writes `report.md` and, if enough was measured, `report.png`; returns the former."""
    rows = load(folder)
    measured = {row["case"]: row for row in rows if row.get("median_ms") and "case" in row}
    cases = summary.with_floors(list(measured.values()))
    right = [row for row in cases if report.is_right(row)]
    sections = {
        "head": lambda: _header(rows),
        "stages": lambda: _stages(rows),
        "others": lambda: _others(rows, set(measured)),
        "tunings": lambda: _tunings(rows),
        "checks": lambda: _checks(rows),
        "wrong": lambda: ["", *report.wrong(cases)],
        "alone": lambda: _alone([row for row in right if not _is_compared(row, right)]),
        "tables": lambda: report.tables(
            sorted((row for row in right if _is_compared(row, right)), key=_importance)
        ),
    }
    lines = []
    for name, section in sections.items():
        try:
            lines += section()
        except Exception as error:  # the other sections must still be printed
            lines += ["", f"The section {name!r} failed: {error!r}"]
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "report.md").write_text(text)
    try:
        if any(row["op"] == "hybrid_loss" for row in right):
            report.plot(folder, right)
    except Exception as error:
        print(f"report.png: {error!r}")
    return text


def _is_compared(row: Row, rows: list[Row]) -> bool:
    """Whether the problem of a row has a table of its own."""
    same = (all(row[key] == other[key] for key in report.CASE) for other in rows)
    return sum(same) >= COMPARED


def _alone(rows: list[Row]) -> Iterable[str]:
    """One table for all problems without a table of their own."""
    if rows:
        yield from ("", "| | N | V | dtype, divergence, inputs | median ms | of copy | of add |")
        yield "|---|---|---|---|---|---|---|"
    for row in rows:
        inputs = ", ".join(row[key] for key in ("dtype", "divergence", "inputs") if row[key])
        floors = (row.get(key) for key in ("floor_fraction", "add_fraction"))
        of = " | ".join("" if floor is None else f"{floor:.0%}" for floor in floors)
        name = f"{row['provider']} | {row['n']:,} | {row['v']:,} | {inputs}"
        yield f"| {name} | {row['median_ms']:.3g} | {of} |"


def _importance(row: Row) -> tuple:
    """A sort key by which the main size from logits comes last."""
    return row["v"] == 151_936, not row["d"], row["n"] == 8192, not row["inputs"]


def _header(rows: list[Row]) -> Iterable[str]:
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton"))
    machine: Row = next((row for row in rows if "driver" in row), {})
    driver = f", driver {machine['driver']}" if machine else ""
    yield f"{first['device']}{driver}, {versions}, commit {first['commit'][:10]}"
    for row in rows:
        for name in ("prebuilt", "launchers", "fp32_sums_of_bf16"):
            if name in row:
                yield f"- {name.replace('_', ' ')}: {row[name]}"


def _stages(rows: list[Row]) -> Iterable[str]:
    yield from ("", "| stage | outcome | s | kernels found | compiled |", "|---|---|---|---|---|")
    for row in rows:
        if "outcome" in row:
            name = row["stage"]
            caches = [r["cache"] for r in rows if r["stage"] == name and "cache" in r]
            hits = sum(cache["hits"] for cache in caches)
            compiled = sum(r["stage"] == name and "compiled" in r for r in rows)
            note = ", hung" if row.get("hung") else ""
            note += ", the GPU no longer answers" if row.get("health") is False else ""
            ending, seconds = row["outcome"] + note, row.get("seconds", 0)
            yield f"| {name} | {ending} | {seconds:.0f} | {hits} | {compiled} |"


def _others(rows: list[Row], measured: set[str]) -> Iterable[str]:
    yield ""
    for row in rows:
        if "meeting" in row and "wrong" in row:
            us = "" if row["us"] is None else f", {row['us']:.2f} us"
            wrong = "" if row["wrong"] is None else f", {row['wrong']} wrong"
            yield f"- meeting, {row['meeting']}{us}{wrong}"
        elif "right" in row and "hang" in row:
            verdict = {True: "right", False: "WRONG", None: "not run"}[row["right"]]
            yield f"- {row['hang']}: {verdict}"
        elif "tool" in row:
            yield f"- {row['tool']}: status {row['status']}"
        elif "pytest_status" in row:
            yield f"- smoke tests: pytest's status {row['pytest_status']}"
        elif "profiled" in row:
            name = str(row["profiled"]).split("(")[0]
            skipped = ("device", "commit", "stage", "at", "profiled")
            yield f"- {name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in skipped)
        elif "failed" in row and "check" not in row and row.get("case") not in measured:
            name = next((row[key] for key in NAMES if key in row), row["stage"])
            yield f"- {name}: {row['failed']}"
    late = {
        f"{row.get('case') or row['tuning']} ({1 - row['host_ahead']:.0%})": None
        for row in rows
        if row.get("host_ahead", 1) < 1
    }
    if late:
        yield f"- the host was late, in this share of the samples: {'; '.join(late)}"
    for row, after in itertools.pairwise([*heard(rows), {"outcome": ""}]):
        if "begun" in row and "outcome" in after:
            yield f"- {row['begun']}: begun, never ended"


def _tunings(rows: list[Row]) -> Iterable[str]:
    """The fastest tunings of each problem, with the share of `add`'s bandwidth they reach."""
    tried = [row for row in rows if "tuning" in row and row.get("median_ms")]
    # The first such row comes from the stage `ceilings`.
    add = next((row for row in rows if row.get("provider") == "add" and row.get("median_ms")), None)
    rate = add["floor_bytes"] / add["median_ms"] if add else math.inf
    for of in dict.fromkeys(row["of"] for row in tried):
        yield from ("", f"Tunings, {of}", "", "| | median ms | of add |", "|---|---|---|")
        sorted_rows = sorted((r for r in tried if r["of"] == of), key=lambda r: r["median_ms"])
        for row in sorted_rows[:FASTEST]:
            ms = row["median_ms"]
            yield f"| {row['tuning']} | {ms:.3g} | {row['floor_bytes'] / rate / ms:.0%} |"
    for row in rows:
        if "best_tuning" in row:
            yield f"Best of {row['itemsize']} bytes: {row['best_tuning']}"


def _checks(rows: list[Row]) -> Iterable[str]:
    checks: dict[str, Row] = {}
    for row in rows:
        # A check that a later run did not start keeps its earlier result.
        if "check" in row and ("right" in row or row["check"] not in checks):
            checks[row["check"]] = row
    good = sum(row.get("right") is True for row in checks.values())
    if checks:
        yield from ("", f"Against float64: {good} of {len(checks)} right.")
    for row in checks.values():
        if "failed" in row:
            yield f"- {row['check']}: {row['failed']}"
        elif row["right"] is False:
            yield f"- WRONG: {row['check']}: gradient {row['gradient']:.1e}, {row['values']:.1e}"

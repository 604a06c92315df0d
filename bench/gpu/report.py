"""What the runs on one GPU found, as Markdown: `report.md` of a folder of `results-*.jsonl`.

Runs of one commit are read together, and of a case measured twice the newest counts. What matters
most comes last, where the end of a terminal's output is.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench import report, summary
from bench.summary import Row

# Tunings that are shown, and how many a problem must have been measured with for its own table.
FASTEST, COMPARED = 8, 3
# By which a row may be called.
NAMES = ("case", "tuning", "hang", "meeting", "profiled")


def parse(path: Path) -> list[Row]:
    """The rows of a run. (What was cut off in the middle of a line leaves half of one.)"""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def heard(rows: list[Row]) -> list[Row]:
    """What a stage has said itself, and not Triton's compiler."""
    return [row for row in rows if "compiled" not in row and "cache" not in row]


def load(folder: Path) -> list[Row]:
    """The rows of the newest commit, oldest first; each with its `device`."""
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
    """Writes `report.md` and, where enough was measured, `report.png`."""
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
        except Exception as error:  # which must not cost the others
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
    """Whether its problem has a table of its own."""
    alike = (all(row[key] == other[key] for key in report.CASE) for other in rows)
    return sum(alike) >= COMPARED


def _alone(rows: list[Row]) -> Iterable[str]:
    """One table for problems that few have been measured on."""
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
    """The main size, without hidden states, comes last."""
    return row["v"] == 151_936, not row["d"], row["n"] == 8192, not row["inputs"]


def _header(rows: list[Row]) -> Iterable[str]:
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton"))
    here: Row = next((row for row in rows if "driver" in row), {})
    driver = f", driver {here['driver']}" if here else ""
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
            found = sum(cache["hits"] for cache in caches)
            compiled = sum(r["stage"] == name and "compiled" in r for r in rows)
            note = ", hung" if row.get("hung") else ""
            note += ", the GPU no longer answers" if row.get("health") is False else ""
            ending, seconds = row["outcome"] + note, row.get("seconds", 0)
            yield f"| {name} | {ending} | {seconds:.0f} | {found} | {compiled} |"


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
            known = ("device", "commit", "stage", "at", "profiled")
            yield f"- {name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in known)
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
    """The fastest of each problem, and what share of `add`'s bandwidth they reach."""
    tried = [row for row in rows if "tuning" in row and row.get("median_ms")]
    add = next((row for row in rows if row.get("provider") == "add" and row.get("median_ms")), None)
    # (The first is that of the stage `ceilings`.)
    rate = add["floor_bytes"] / add["median_ms"] if add else math.inf
    for of in dict.fromkeys(row["of"] for row in tried):
        yield from ("", f"Tunings, {of}", "", "| | median ms | of add |", "|---|---|---|")
        own = sorted((row for row in tried if row["of"] == of), key=lambda row: row["median_ms"])
        for row in own[:FASTEST]:
            ms = row["median_ms"]
            yield f"| {row['tuning']} | {ms:.3g} | {row['floor_bytes'] / rate / ms:.0%} |"
    for row in rows:
        if "best_tuning" in row:
            yield f"Best of {row['itemsize']} bytes: {row['best_tuning']}"


def _checks(rows: list[Row]) -> Iterable[str]:
    checks: dict[str, Row] = {}
    for row in rows:
        # (What was not begun is no news of what was.)
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

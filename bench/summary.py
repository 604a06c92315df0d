"""Rows of results: what is derived from times, and `summary.json`, a list of rows."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PERCENTILES = {"p20_ms": 0.2, "median_ms": 0.5, "p80_ms": 0.8}


def percentiles(ms: list[float]) -> Row:
    """Percentiles of some times; None if there are none."""
    times = sorted(ms)
    at = {name: round(share * (len(times) - 1)) for name, share in PERCENTILES.items()}
    return {name: round(times[i], 4) if times else None for name, i in at.items()}


def versions() -> dict[str, str | None]:
    """The versions that figures depend on; None for a package that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def summarise(raw: dict) -> list[Row]:
    """One row for each case of pytest-benchmark's results."""
    stamp = raw["machine_info"]["hybrid_kernels"]
    commit = os.environ.get("HYBRID_KERNELS_COMMIT") or raw["commit_info"]["id"]
    rows = []
    for entry in raw["benchmarks"]:
        times = [1e3 * t for t in entry["stats"]["data"]]
        row = {**entry["extra_info"], **percentiles(times), "samples": len(times)}
        rows.append({**row, "commit": commit, "device": stamp["device"]})
    return with_floors(rows)


def with_floors(rows: list[Row]) -> list[Row]:
    """The rows with lower bounds of their times, as fractions of the median times.

    From logits, `floor_fraction` is the time that the fewest bytes would take at the bandwidth of a
    copy, `add_fraction` at that of an addition, which reads two tensors and writes one like a loss.
    The best copy and addition of the same dtype and the nearest size count. From hidden states,
    `floor_fraction` is the time of the four GEMMs alone.
    """
    result = []
    for row in rows:
        floors: Row = {"floor_fraction": None}
        if row["d"]:
            key = ("n", "v", "d", "dtype")
            same = (o for o in rows if o["op"] == "gemms" and all(o[k] == row[k] for k in key))
            gemms = next(same, None)
            if gemms is not None:
                floors["floor_fraction"] = round(gemms["median_ms"] / row["median_ms"], 4)
        else:
            copy, add = (_nearest(row, rows, op) for op in ("copy", "add"))
            if copy is not None:
                floors["floor_fraction"] = _fraction(row, copy)
                floors["copy_tb_s"] = round(copy["floor_bytes"] / copy["median_ms"] / 1e9, 4)
            if add is not None:
                floors["add_fraction"] = _fraction(row, add)
        result.append({**row, **floors})
    return result


def _nearest(row: Row, rows: list[Row], op: str) -> Row | None:
    """The fastest row of an operation with the same dtype, if there is one, and nearest size."""
    measured = [other for other in rows if other["op"] == op]
    same = [other for other in measured if other["dtype"] == row["dtype"]] or measured
    size = row["n"] * row["v"]
    return min(same, key=lambda o: (abs(o["n"] * o["v"] - size), o["median_ms"]), default=None)


def _fraction(row: Row, plain: Row) -> float:
    floor_ms = row["floor_bytes"] / plain["floor_bytes"] * plain["median_ms"]
    return round(floor_ms / row["median_ms"], 4)


def write(folder: Path) -> list[Row]:
    """Writes the `summary.json` of a folder with a `raw.json`."""
    rows = summarise(json.loads((folder / "raw.json").read_text()))
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows

"""From pytest-benchmark's raw results to rows: `summary.json` is a list of them."""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PERCENTILES = {"p20_ms": 0.2, "median_ms": 0.5, "p80_ms": 0.8}


def summarise(raw: dict) -> list[Row]:
    """One row for each case, with medians in milliseconds.

    `floor_fraction` is the time that the fewest bytes would take at the bandwidth of a copy of the
    same logits (the best of this run, of the same dtype and size or else the nearest size), over
    the median time; from hidden states it is the time of the four GEMMs alone over the median time.
    """
    stamp = raw["machine_info"]["hybrid_kernels"]
    commit = os.environ.get("HYBRID_KERNELS_COMMIT") or raw["commit_info"]["id"]
    rows = []
    for entry in raw["benchmarks"]:
        info = dict(entry["extra_info"])
        times = sorted(info.pop("device_ms", [1e3 * t for t in entry["stats"]["data"]]))
        for name, share in PERCENTILES.items():
            info[name] = round(times[round(share * (len(times) - 1))], 4)
        rows.append({**info, "samples": len(times), "commit": commit, "device": stamp["device"]})
    copies = [row for row in rows if row["op"] == "copy"]
    for row in rows:
        row["floor_fraction"] = None
        if row["d"]:
            key = ("n", "v", "d", "dtype")
            alike = (o for o in rows if o["op"] == "gemms" and all(o[k] == row[k] for k in key))
            bare = next(alike, None)
            if bare is not None:
                row["floor_fraction"] = round(bare["median_ms"] / row["median_ms"], 4)
            continue
        same = [copy for copy in copies if copy["dtype"] == row["dtype"]] or copies
        size = row["n"] * row["v"]
        nearest = min(
            same, key=lambda c: (abs(c["n"] * c["v"] - size), c["median_ms"]), default=None
        )
        if nearest is not None:
            floor_ms = row["floor_bytes"] / nearest["floor_bytes"] * nearest["median_ms"]
            row["floor_fraction"] = round(floor_ms / row["median_ms"], 4)
            row["copy_tb_s"] = round(nearest["floor_bytes"] / nearest["median_ms"] / 1e9, 4)
    return rows


def write(folder: Path) -> list[Row]:
    """Writes `summary.json` beside a folder's `raw.json`."""
    rows = summarise(json.loads((folder / "raw.json").read_text()))
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows

"""`python -m bench RESULTS.json [SUMMARY.json]`: pytest-benchmark's raw results as a table.

The table is Markdown; the summary is a list of rows with medians in milliseconds.
"""

import json
import sys
from pathlib import Path

PERCENTILES = {"p20_ms": 0.2, "median_ms": 0.5, "p80_ms": 0.8}


def summarise(raw: dict) -> list[dict]:
    """One row for each benchmark: what was measured, its percentiles, and where."""
    commit = raw["commit_info"]["id"]
    rows = []
    for entry in raw["benchmarks"]:
        times = sorted(entry["stats"]["data"])
        percentiles = {
            name: round(1e3 * times[round(share * (len(times) - 1))], 3)
            for name, share in PERCENTILES.items()
        }
        rows.append({**entry["extra_info"], **percentiles, "commit": commit})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, one block for each size, dtype and divergence; times relative to torch eager."""
    lines = []
    keys = ("n", "v", "dtype", "divergence")
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        own = [row for row in rows if tuple(row[key] for key in keys) == case]
        eager = next((row for row in own if row["provider"] == "torch eager"), None)
        lines += [
            "",
            f"N={case[0]}, V={case[1]:,}, {case[2]}, {case[3]}",
            "",
            "| | median ms | p20-p80 | of eager | peak MiB | of eager | gradient error |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in own:
            relative = [
                "" if eager is None else f"{row[key] / eager[key]:.2f}"
                for key in ("median_ms", "peak_mib")
            ]
            error = f"{row['grad_error']:.0e}" if "grad_error" in row else ""
            lines.append(
                f"| {row['provider']} | {row['median_ms']:.0f} | {row['p20_ms']:.0f}-"
                f"{row['p80_ms']:.0f} | {relative[0]} | {row['peak_mib']:.0f} | {relative[1]} | "
                f"{error} |"
            )
    return "\n".join(lines).strip()


def main() -> int:
    if not 2 <= len(sys.argv) <= 3:
        print(__doc__)
        return 2
    raw = json.loads(Path(sys.argv[1]).read_text())
    rows = summarise(raw)
    if len(sys.argv) == 3:
        stamp = {**raw["machine_info"]["hybrid_kernels"], "when": raw["datetime"]}
        Path(sys.argv[2]).write_text(json.dumps({"machine": stamp, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

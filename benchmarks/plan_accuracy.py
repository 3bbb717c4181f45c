"""How near `lorafit plan` comes: its memory and time beside what the same run then takes.

    python -m benchmarks.plan_accuracy --max-steps 24 [-- any options of lorafit train]

Stores both and their ratios under `benchmarks/results/plan_accuracy.json` and prints them; ends with status 1 if the
measured plan is further from the run than 15 %. Run it on a quiet machine: times of a busy one say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
NEAR = 0.15
"""The share by which a prediction may be off."""
KEYS = ("peak_bytes", "train_seconds", "evaluation_seconds", "seconds")


def lorafit(command: str, *options: str) -> dict[str, Any]:
    """What one command says under --json."""
    line = [sys.executable, "-m", "lorafit", command, *options, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(options: list[str]) -> dict[str, Any]:
    """Plans a run, does it, and sets the two side by side."""
    planned = lorafit("plan", *options)
    with tempfile.TemporaryDirectory() as folder:
        ran = lorafit("train", *options, "--output-dir", f"{folder}/run")
        records = [json.loads(line) for line in Path(folder, "run", "records.jsonl").read_text().splitlines()]
    took = {
        "peak_bytes": ran["peak_rss_bytes"],
        "train_seconds": ran["train_seconds"],
        "evaluation_seconds": sum(one["seconds"] for one in records if one["event"] == "evaluation"),
        "seconds": ran["seconds"],
        "steps": [one["seconds"] for one in records if one["event"] == "step"],
    }
    ratios = {
        kind: {key: planned[kind][key] / took[key] for key in KEYS if took[key]}
        for kind in ("formula", "measured")
        if planned[kind] is not None
    }
    return {"options": options, "planned": planned, "took": took, "ratios": ratios}


def main() -> int:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description="How near `lorafit plan` comes to the run.")
    parser.add_argument("--max-steps", default="24")
    parser.add_argument("--store", type=Path, default=RESULTS)
    known, rest = parser.parse_known_args()
    found = compare(["--max-steps", known.max_steps, *(word for word in rest if word != "--")])
    known.store.parent.mkdir(parents=True, exist_ok=True)
    known.store.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{'':20}{'run':>12}{'formula':>12}{'ratio':>7}{'measured':>12}{'ratio':>7}\n")
    for key in KEYS:
        cells = [f"{found['took'][key]:12.5g}"]
        for kind in ("formula", "measured"):
            if kind in found["ratios"] and key in found["ratios"][kind]:
                cells.append(f"{found['planned'][kind][key]:12.5g}{found['ratios'][kind][key]:7.2f}")
        sys.stdout.write(f"{key:20}{''.join(cells)}\n")
    best = found["ratios"].get("measured") or found["ratios"]["formula"]
    return int(any(abs(best[key] - 1) > NEAR for key in ("peak_bytes", "train_seconds")))


if __name__ == "__main__":
    sys.exit(main())

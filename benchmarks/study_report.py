"""Collects what docs/study.md is made from: the runs' metrics, trimmed, and their comparison.

    python benchmarks/study_report.py runs/study/runs --gpu "4 x H200" --command "..." \\
        --versions "torch 2.11, ..." --note "..."
    python benchmarks/study_report.py                     # again, from the files that are kept

Reads ``RUNS/NAME/metrics.jsonl`` (or ``RUNS/NAME.jsonl``) and writes
``benchmarks/results/study/metrics/NAME.jsonl``. Beside them it writes ``comparison.json``, the
result of ``qerl compare`` of all runs against the arm bf16 without the curves, and prints its
tables.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from qerl_verl.compare.runs import find_parts

RESULTS = Path(__file__).resolve().parent / "results" / "study"
KEPT = re.compile(
    r"critic/score/mean|actor/(entropy|grad_norm|lr)|qerl/.*|val-core/.*|response_length/(mean|clip_ratio)"
    r"|rollout_corr/(k3_kl|rollout_is_eff_sample_size)|training/rollout_probs_diff_mean"
    r"|timing_s/(step|gen|old_log_prob|update_actor|update_weights|testing)"
)


def trim(lines: list[str]) -> list[str]:
    """Returns the lines of verl's file logger with the metrics of :data:`KEPT`, in six digits."""
    out = []
    for line in lines:
        entry = json.loads(line)
        data = {k: float(f"{v:.6g}") for k, v in entry["data"].items() if KEPT.fullmatch(k)}
        out.append(json.dumps({"step": entry["step"], "data": data}))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="?", type=Path, help="folder of the runs; without it, the kept files are compared"
    )
    parser.add_argument("--gpu", help="what the runs had, for the record")
    parser.add_argument("--versions", help="of torch, vLLM, verl and others on that machine")
    parser.add_argument("--command", help="that made the runs")
    parser.add_argument("--note", help="what a reader has to know of these runs")
    parser.add_argument("--baseline", default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    kept = arguments.out / "metrics"
    if not arguments.runs and not any(kept.glob("*.jsonl")):
        parser.error(f"{kept} holds no metrics of runs; name the folder of the runs")
    if arguments.runs:
        kept.mkdir(parents=True, exist_ok=True)
        files = {f.parent.name: f for f in sorted(arguments.runs.glob("*/metrics.jsonl"))}
        files |= {f.stem: f for f in sorted(arguments.runs.glob("*_s[0-9]*.jsonl"))}
        for name, file in files.items():
            lines = [line for part in (*find_parts(file), file) for line in part.read_text().splitlines()]
            (kept / f"{name}.jsonl").write_text("\n".join(trim(lines)) + "\n")
        about = {name: getattr(arguments, name) for name in ("command", "gpu", "versions", "note")}
        (arguments.out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    compare = [
        sys.executable,
        "-m",
        "qerl_verl.cli.main",
        "compare",
        *sorted(f"metrics/{file.name}" for file in kept.glob("*.jsonl")),
    ]
    compare += ["--baseline", arguments.baseline, "--json", "comparison.json"]
    compare += ["--png", "curves.png"]
    # run in the folder, which keeps this machine's paths out of the result
    if code := subprocess.run(compare, cwd=arguments.out).returncode:
        return code
    comparison = arguments.out / "comparison.json"
    found = json.loads(comparison.read_text())
    del found["curves"]  # metrics/ has them
    comparison.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

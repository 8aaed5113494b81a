"""Reports the errors of a quantization by kind of layer, the worst layers, and the loss on a
text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.quantizers import SquaredError

REPORT_FILE = "qerl_report.json"
_WORST = 5


def build_report(
    method: str,
    errors: Mapping[str, SquaredError],
    prefix: str,
    calibration: Calibration | None = None,
    text: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns the content of :data:`REPORT_FILE`.

    Args:
        method: see :data:`~qerl_verl.nvfp4.quantizers.Method`.
        errors: full name of a linear -> its error.
        prefix: what the names of decoder layers begin with, ``model.layers.``
        calibration: the calibration text.
        text: result of :meth:`~qerl_verl.nvfp4.decoder.LayerwiseDecoder.compare` on
            ``calibration.held_out``.

    Returns:
        ``method``; ``calibration`` and ``text``, which may be None; ``kinds`` and ``linears``, name
        -> ``weight_error`` (squared error over squared magnitude), ``weight_snr_db`` and, after
        GPTQ, ``output_error`` on the calibration text; ``worst``, the names of the linears with the
        largest output error, or the largest weight error where no outputs were measured.
    """
    kinds: dict[str, list[SquaredError]] = {}
    for name, error in errors.items():
        # all experts of a layer form one kind
        kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix(prefix).partition(".")[2])
        kinds.setdefault(kind, []).append(error)
    linears = {name: _relative([error]) for name, error in errors.items()}
    by = "output_error" if any("output_error" in values for values in linears.values()) else "weight_error"
    worst = sorted(linears, key=lambda name: (-linears[name].get(by, 0.0), name))[:_WORST]
    return {
        "method": method,
        "calibration": calibration.describe() if calibration else None,
        "text": dict(text) if text else None,
        "kinds": {kind: _relative(members) for kind, members in kinds.items()},
        "worst": worst,
        "linears": linears,
    }


def read_report(path: Path) -> dict[str, Any]:
    """Returns the report in a checkpoint's folder.

    Raises:
        OSError, ValueError: the report is missing or is not JSON.
    """
    return json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))


def format_report(report: Mapping[str, Any]) -> str:
    """Returns the report of :func:`build_report` as a table for the terminal."""
    outputs = any("output_error" in values for values in report["kinds"].values())
    lines = [f"{'relative squared error':24} {'weights':>10} {'SNR':>9}" + (f" {'outputs':>10}" if outputs else "")]
    worst = {f"worst: {name}": report["linears"][name] for name in report["worst"][:3]}
    for name, values in (report["kinds"] | worst).items():
        output = f" {values['output_error']:10.2e}" if "output_error" in values else ""
        lines.append(f"{name:24} {values['weight_error']:10.2e} {values['weight_snr_db']:6.1f} dB{output}")
    if text := report["text"]:
        lines.append(
            f"on {text['tokens']} tokens of text that was kept apart, in nats a token: loss "
            f"{text['loss']:.3f} (before: {text['reference_loss']:.3f}), KL divergence "
            f"{text['kl']:.3f}, entropy {text['entropy']:.3f}"
        )
    return "\n".join(lines)


def _relative(errors: list[SquaredError]) -> dict[str, float]:
    weight_error = _ratio(sum(e.weight_error for e in errors), sum(e.weight for e in errors))
    # an exact copy has an infinite signal-to-noise ratio, which JSON cannot hold
    values = {"weight_error": weight_error, "weight_snr_db": -10 * math.log10(max(weight_error, 1e-20))}
    outputs = [(e.output_error, e.output) for e in errors if e.output_error is not None and e.output is not None]
    if len(outputs) == len(errors):
        values["output_error"] = _ratio(sum(error for error, _ in outputs), sum(square for _, square in outputs))
    return values


def _ratio(error: float, square: float) -> float:
    return error / square if square > 0 else 0.0

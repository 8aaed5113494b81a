"""Quantizes in a process of its own, so that the caller holds no GPU memory afterwards.

The driver of a run is such a caller. A CUDA context takes some hundred MB of GPU memory until its
process ends, and actor and rollout are about to share that GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.safetensors_stream import FileRecord


def quantize_in_a_process(
    src: Path, dst: Path, *, method: str, calibration: Calibration | None, device: str | None, progress: bool
) -> dict[str, FileRecord]:
    """Runs :func:`~qerl_verl.nvfp4.quantize.quantize_checkpoint` in a process of its own.

    That process has ended when this function returns. Its progress bar appears on this process's
    stderr.

    Args:
        src, dst, method, calibration, device, progress: as for ``quantize_checkpoint``.

    Returns:
        File name -> size and SHA-256 of every file in ``dst``.

    Raises:
        CheckpointError: as ``quantize_checkpoint``; or a signal ended the process.
    """
    job: dict[str, Any] = dict(src=str(src), dst=str(dst), method=method, device=device, progress=progress)
    job["calibration"] = calibration and [calibration.sequences, calibration.held_out, calibration.source]
    command = [sys.executable, "-m", "qerl_verl.nvfp4.isolated"]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    answer = done.stdout.splitlines()[-1:]  # libraries print to stdout before it
    try:
        result = json.loads(answer[0])
    except (IndexError, ValueError):
        raise CheckpointError(
            f"{dst}: the process that quantizes ended with code {done.returncode}; see stderr."
        ) from None
    if "error" in result:
        raise CheckpointError(result["error"])
    return {name: FileRecord(*record) for name, record in result["files"].items()}


def _end_with(parent: int, leave: Callable[[int], None] = os._exit, every: float = 2.0) -> None:
    """Calls ``leave`` when the parent has died, by whatever signal.

    Nobody waits for the checkpoint then. The next attempt removes what is unfinished
    (:mod:`qerl_verl.nvfp4.atomic_folder`).
    """
    while os.getppid() == parent:
        time.sleep(every)
    leave(1)


def _main() -> int:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job = json.load(sys.stdin)
    sequences = job.pop("calibration")
    if sequences:
        *parts, source = sequences
        kept, held_out = (tuple((tuple(ids), begin) for ids, begin in part) for part in parts)
        job["calibration"] = Calibration(kept, held_out, source)
    try:
        records = quantize_checkpoint(job.pop("src"), job.pop("dst"), **job)
    except (CheckpointError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"files": {name: [record.size, record.sha256] for name, record in records.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(_main())

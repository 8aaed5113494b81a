"""vLLM's cache of compiled graphs, for the engines of a rollout (``qerl.rollout.compile_cache``).

verl turns vLLM's cache off (``VLLM_DISABLE_COMPILE_CACHE=1``, verl/trainer/constants_ppo.py),
because engines that write the same files at the same time left broken ones (vllm#31199). vLLM and
PyTorch write the compiled code by a rename since then, and vLLM's index file still in place
(vllm/compilation/backends.py, ``save_to_file``). So here each engine of a node has a folder of its
own, which one engine at a time uses, and a folder is emptied if an engine did not come up with it.

vLLM's own key covers its version, the model, the engine's settings and the sources that it traces.
The folder's name adds the sources of QeRL.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

import qerl_verl.kernels
from qerl_verl.kernels.autotune import cache_folder
from qerl_verl.log_lines import say

DISABLE, ROOT = "VLLM_DISABLE_COMPILE_CACHE", "VLLM_CACHE_ROOT"
"""vLLM's variables. verl sets the first to 1."""
STARTING = "starting"
"""File in an engine's folder while the engine starts."""
MARK = "made_by_qerl_verl"
"""File in the folder of each version of the sources, whose time is that of the last use. vLLM's own
cache may lie beside it, as with ``QERL_KERNEL_CACHE=~/.cache``."""
KEPT_DAYS = 30
"""Days after which the folder of other sources of QeRL is removed, since its last use."""


@functools.cache
def hash_sources() -> str:
    """Returns a hash of the Python files of QeRL, its kernels included."""
    digest = hashlib.sha256()
    for package in (qerl_verl, qerl_verl.kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def compile_cache(engine: str) -> Iterator[Path | None]:
    """Lets the vLLM engine that starts within use the cache.

    Processes that are started within inherit the variables. Where the user has set them, nothing is
    changed. Where the folder cannot be used, the engine compiles as without the setting, and a line
    says why.

    Args:
        engine: name of the engine, unique among those of a run on the node.

    Yields:
        The engine's folder, or None.
    """
    if os.environ.get(DISABLE) != "1" or ROOT in os.environ:
        yield None
        return
    folder = cache_folder().absolute() / "vllm" / hash_sources() / engine
    lock = FileLock(folder.parent / f"{engine}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        _prepare(folder)
    except (OSError, NotImplementedError, Timeout) as error:
        lock.release()
        why = "an engine of another run starts with it" if isinstance(error, Timeout) else error
        say(f"vLLM compiles without its cache {folder}: {why}")
        yield None
        return
    try:
        os.environ |= {DISABLE: "0", ROOT: str(folder)}
        yield folder
        (folder / STARTING).unlink(missing_ok=True)
    finally:
        os.environ[DISABLE] = "1"
        del os.environ[ROOT]
        lock.release()


def _prepare(folder: Path) -> None:
    """Empties the folder if the last engine did not come up with it, and marks that one starts.

    Also removes the folders of sources that have not been used for :data:`KEPT_DAYS`, as far as
    :data:`MARK` shows that QeRL made them.
    """
    if (folder / STARTING).exists():
        shutil.rmtree(folder)
        folder.mkdir()
    (folder / STARTING).touch()
    (folder.parent / MARK).touch()
    for mark in folder.parent.parent.glob(f"*/{MARK}"):
        if mark.parent != folder.parent and mark.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            shutil.rmtree(mark.parent, ignore_errors=True)

"""Resolves a model path or hub name to a local NVFP4 folder, quantizing at most once.

A cache entry is a folder ``<model_type>-<key>``. The key is a hash of the content of every source
file and of the format version. The entry appears by one rename of a finished folder, so it is
complete or absent. A file lock beside it keeps other processes from doing the same work.
Correctness rests on the rename; the lock only saves work. Where a shared file system does not
honour locks between nodes, each node quantizes and the first to finish wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from qerl_verl.json_files import write_json_atomically
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.checkpoint_files import (
    CONFIG_FILE,
    PICKLES,
    PICKLES_ALONE,
    read_config,
    source_files,
)
from qerl_verl.nvfp4.convert import CONVERT_VERSION, convert_checkpoint
from qerl_verl.nvfp4.errors import CheckpointError, writes_to
from qerl_verl.nvfp4.format import FORMAT, FORMAT_VERSION, read_quantization
from qerl_verl.nvfp4.gptq import GPTQ_VERSION
from qerl_verl.nvfp4.isolated import quantize_in_a_process
from qerl_verl.nvfp4.manifest import MANIFEST_FILE, check_files
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.quantizers import NEEDS_CALIBRATION
from qerl_verl.nvfp4.safetensors_stream import file_sha256
from qerl_verl.nvfp4.validation import check_checkpoint, check_source, unused_settings
from qerl_verl.ownership import host_name

_DIGESTS_FILE = "digests.json"
_CONVERT = "convert-"  # stands in the place of a method for a source that is already quantized
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_HUB_IGNORE = ("consolidated*", "original/*", "onnx/*")
_ANNOUNCED_BYTES = 1_000_000_000  # the hashing of a larger file is announced on stderr
_REMARK_SECONDS = 15.0  # interval of the messages of a waiting process


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A local NVFP4 folder."""

    path: Path
    source: str
    """The path or hub name that was requested."""
    kind: Literal["as_is", "quantized", "converted"]
    """``as_is``: the source is NVFP4. ``quantized``, ``converted``: ``path`` is a cache entry."""
    notes: tuple[str, ...] = ()
    """Settings of the source that a run does not use, see
    :func:`~qerl_verl.nvfp4.validation.unused_settings`."""


_OTHER_CACHE = "Name a folder that can be, with qerl.cache_dir, --cache-dir or $QERL_CACHE."


def default_cache_dir() -> Path:
    """Returns ``$QERL_CACHE``, or ``~/.cache/qerl_verl``."""
    return Path(os.environ.get("QERL_CACHE") or "~/.cache/qerl_verl").expanduser()


@dataclass(frozen=True)
class Quantization:
    """How a model in 16 or 32 bits is quantized.

    Attributes:
        method: see :data:`~qerl_verl.nvfp4.quantizers.Method`.
        calibration: makes the method's text from the model's folder (its tokenizer). It is called
            only where the model must be looked up or quantized.
        device: where to compute; by default the current GPU, or the CPU where there is none.
        isolated: quantize in a process of its own, see :mod:`qerl_verl.nvfp4.isolated`.
    """

    method: str = "four-over-six"
    calibration: Callable[[Path], Calibration] | None = None
    device: str | None = None
    isolated: bool = False


def resolve_checkpoint(
    model_path: str | Path,
    cache_dir: str | Path | None = None,
    quantization: Quantization = Quantization(),
    *,
    progress: bool = True,
) -> ResolvedCheckpoint:
    """Returns a model's local NVFP4 checkpoint, quantizing it into the cache where necessary.

    Any number of processes, on any number of nodes that share ``cache_dir``, may call this function
    at the same time. One of them quantizes; the others wait and name it on stderr. A process that
    is killed leaves nothing that is used, and the next attempt removes its temporary folder.

    Args:
        model_path: a local folder, or the name of a model on the Hugging Face hub
            (``HF_HUB_OFFLINE`` is respected).
        cache_dir: None means :func:`default_cache_dir`.
        quantization: how to quantize. Each method and each calibration text has its own cache
            entry.
        progress: show a progress bar on stderr.

    Raises:
        UnsupportedArchitecture, CheckpointError: as
            :func:`~qerl_verl.nvfp4.quantize.quantize_checkpoint`; or the model is neither a
            folder nor available from the hub; or a cache entry is damaged.
    """
    source = str(model_path)
    folder = fetch_model(source)
    kind = check_checkpoint(folder)  # fails before the hashing of many gigabytes
    if kind == "nvfp4":
        return ResolvedCheckpoint(folder, source, "as_is", tuple(unused_settings(folder)))
    if kind != "none":
        quantization = Quantization(f"{_CONVERT}{kind}")

    config = read_config(folder)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cache = cache.expanduser().absolute()
    with writes_to(cache, _OTHER_CACHE):
        cache.mkdir(parents=True, exist_ok=True)
    calibration = None
    if quantization.method in NEEDS_CALIBRATION and quantization.calibration is not None:
        calibration = quantization.calibration(folder)
    key = _content_key(folder, cache, quantization.method, calibration)
    entry = cache / f"{config.get('model_type', 'model')}-{key}"
    if not entry.exists():
        with writes_to(cache, _OTHER_CACHE), _exclusive(entry):
            if not entry.exists():
                _fill(entry, folder, quantization, calibration, progress, cache)
    _verify(entry, cache)
    if kind == "none":
        return ResolvedCheckpoint(entry, source, "quantized")
    return ResolvedCheckpoint(entry, source, "converted", tuple(unused_settings(folder)))


def resolve_source(model_path: str | Path) -> Path:
    """Returns the local folder of a 16- or 32-bit checkpoint, fetching it from the hub if needed.

    Args:
        model_path: as for :func:`resolve_checkpoint`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`resolve_checkpoint`; or the checkpoint
            is quantized.
    """
    folder = fetch_model(str(model_path))
    check_source(folder)
    return folder


def fingerprint(folder: str | Path, cache_dir: str | Path | None = None) -> str:
    """Returns a path-independent hash of the weights of an NVFP4 folder, 16 hexadecimal digits.

    A file is hashed again only when it changes.

    Args:
        folder: see :attr:`ResolvedCheckpoint.path`.
        cache_dir: as for :func:`resolve_checkpoint`; stores the hashes.
    """
    folder = Path(folder)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    digests = _Digests(cache.expanduser().absolute() / _DIGESTS_FILE)
    hashes = {name: digests.of(folder / name) for name in source_files(folder) if name.endswith(".safetensors")}
    digests.save()
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]


def _fill(
    entry: Path,
    folder: Path,
    quantization: Quantization,
    calibration: Calibration | None,
    progress: bool,
    cache: Path,
) -> None:
    how: dict[str, Any] = dict(
        method=quantization.method, calibration=calibration, device=quantization.device, progress=progress
    )
    try:
        if quantization.method.startswith(_CONVERT):
            records = convert_checkpoint(folder, entry, progress=progress)
        else:
            records = (quantize_in_a_process if quantization.isolated else quantize_checkpoint)(folder, entry, **how)
    except CheckpointError:
        if not (entry / MANIFEST_FILE).exists():  # otherwise another node finished first
            raise
    else:
        digests = _Digests(cache / _DIGESTS_FILE)
        for name, record in records.items():
            digests.remember(entry / name, record.sha256)
        digests.save()


def _verify(entry: Path, cache: Path) -> None:
    """Compares the sizes of all files and the content of the weights with the manifest.

    A file of weights is hashed again only when it changes.

    Raises:
        CheckpointError: the entry is damaged.
    """
    digests = _Digests(cache / _DIGESTS_FILE)
    try:
        check_files(entry, hashed=lambda name: name.endswith(".safetensors"), sha256=digests.of)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} This cache entry is damaged. With the folder {entry} moved elsewhere, the "
            "next start quantizes the model anew."
        ) from None
    digests.save()


# --- the key ---


def _content_key(folder: Path, cache: Path, method: str, calibration: Calibration | None) -> str:
    """Returns a hash of all source files and of how they are quantized."""
    digests = _Digests(cache / _DIGESTS_FILE)
    files = {name: digests.of(folder / name) for name in source_files(folder)}
    digests.save()
    content: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "files": files, "method": method}
    if method.startswith(_CONVERT):
        content |= {"convert": CONVERT_VERSION}
    if calibration is not None:
        content |= {"calibration": calibration.key, "gptq": GPTQ_VERSION}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Digests:
    """SHA-256 of files, remembered for as long as size, inode and times stay the same.

    The times include that of the inode's last change (inode(7), ctime), which no program can set
    back.
    """

    def __init__(self, store: Path):
        self._store = store
        self._known = self._load()
        self._new: dict[str, list] = {}

    def of(self, path: Path) -> str:
        path = path.resolve()
        if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name):
            return path.name  # the hub's cache names large files by their SHA-256
        stamp = self._stamp(path)
        known = self._new.get(str(path)) or self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == stamp:
            return known[-1]
        if stamp[0] > _ANNOUNCED_BYTES:
            print(f"qerl: hashing {path} ({stamp[0] / 1e9:.1f} GB), once", file=sys.stderr)
        digest = file_sha256(path)
        self._new[str(path)] = [*stamp, digest]
        return digest

    def remember(self, path: Path, digest: str) -> None:
        """Stores the hash of a file that was computed while the file was written."""
        path = path.resolve()
        self._new[str(path)] = [*self._stamp(path), digest]

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def save(self) -> None:
        """Stores the hashes that are new.

        If that fails or two processes save at once, some files are hashed again next time.
        """
        if not self._new:
            return
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(self._store, self._load() | self._new)

    def _load(self) -> dict[str, list]:
        try:
            known = json.loads(self._store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


# --- one at a time ---


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of flock(2) on file systems without locks: NFS without lockd, FUSE, Lustre without its
option ``flock``."""


@contextlib.contextmanager
def _exclusive(entry: Path) -> Iterator[None]:
    """Holds the lock of an entry.

    While another process holds it, stderr says which process and for how long. On a file system
    without locks the block runs unlocked, with a warning.
    """
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    owner = entry.with_name(f"{entry.name}.owner.json")
    if reason := _why_no_lock(lock.lock_file):
        print(
            f"qerl: {lock.lock_file} cannot be locked ({reason}); going on without, so another "
            "process may quantize the same model meanwhile",
            file=sys.stderr,
        )
    else:
        _acquire(lock, entry.name, owner)
    try:
        with contextlib.suppress(OSError):  # the file only informs other processes
            who = {"host": host_name(), "pid": os.getpid(), "since": time.time()}
            owner.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the end of the process releases the lock
            lock.release()


def _why_no_lock(path: str) -> str | None:
    """Returns the system's reason why a file can never be locked, or None where it can be.

    A file that another process has locked counts as lockable. On a file system without locks,
    filelock 3 waits for ever, and filelock 4 fails or leaves a lock that outlives a kill.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except PermissionError as error:  # the file belongs to another user
        return error.strerror
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror if error.errno in _NO_LOCKS else None
    finally:
        os.close(descriptor)
    return None


def _acquire(lock: FileLock, name: str, owner: Path) -> None:
    started, timeout = time.monotonic(), 0.0
    while True:
        try:
            lock.acquire(timeout=timeout)
            return
        except Timeout:
            waited = f"{time.monotonic() - started:.0f} s so far"
            print(f"qerl: waiting for {_describe(owner)} to quantize {name} ({waited})", file=sys.stderr)
            timeout = _REMARK_SECONDS


def _describe(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, {time.time() - who['since']:.0f} s at work,"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


# --- the source ---


def fetch_model(model: str) -> Path:
    """Returns the local folder of a model, fetched from the Hugging Face hub if it is not a folder.

    The content of the folder is not checked.

    Raises:
        CheckpointError: the model is neither a folder nor available from the hub.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CheckpointError(f"{model}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        # config.json comes first: a model that cannot be used is not downloaded
        folder = Path(snapshot_download(model, allow_patterns=[CONFIG_FILE]))
        read_quantization(folder)
        get_architecture(read_config(folder))
        _refuse_pickles(model)
        return Path(snapshot_download(model, allow_patterns=list(_HUB_PATTERNS), ignore_patterns=list(_HUB_IGNORE)))
    except CheckpointError:
        raise
    # not found, gated, offline, no network, disk full: the message of huggingface_hub is clear
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise CheckpointError(
            f"{model}: no such folder, and it cannot be fetched from the Hugging Face hub{offline}: {error}"
        ) from error


def _refuse_pickles(model: str) -> None:
    """Refuses a model whose weights the hub has only as PyTorch pickles.

    :data:`_HUB_PATTERNS` leave pickles out.

    Raises:
        CheckpointError: names the model.
    """
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(model)
    except Exception:  # offline, for example: then the files that were downloaded before decide
        return
    if not any(name.endswith(".safetensors") for name in names) and any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(f"{model} on the Hugging Face hub {PICKLES_ALONE}")

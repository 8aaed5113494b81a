"""Tests that resolve_checkpoint quantizes once, in one process, completely or not at all."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid

import huggingface_hub
import pytest

from qerl_verl.nvfp4 import cache as cache_module
from qerl_verl.nvfp4 import quantize as quantize_module
from qerl_verl.nvfp4.architectures import UnsupportedArchitecture
from qerl_verl.nvfp4.cache import default_cache_dir, fingerprint, resolve_checkpoint
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.validation import validate_nvfp4_checkpoint
from qerl_verl.ownership import host_name

# The program of another process: it prints "ready", resolves `model` into `cache`, and prints the
# folder. While it quantizes, it prints "quantizing" and waits until the file `gate` appears.
PROCESS = """
import sys, time
from qerl_verl.nvfp4 import cache as c, packing
sys.stderr = open(stderr, "w", buffering=1)
c._REMARK_SECONDS = 0.2
write = packing._write_packed
def slow_write(*args):
    write(*args)
    say.send("quantizing")
    while not gate.exists():
        time.sleep(0.01)
packing._write_packed = slow_write
say.send("ready")
say.send(c.resolve_checkpoint(model, cache, progress=False).path)
"""


class Process:
    """A real process that starts at once, because a server with all imports forks it."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["qerl_verl.nvfp4.cache", "transformers.models.auto.configuration_auto"])

    def __init__(self, model, cache, gate):
        self._stderr = gate.with_name(f"stderr-{uuid.uuid4().hex}")
        self._hear, say = self._context.Pipe(duplex=False)
        names = dict(model=model, cache=cache, gate=gate, stderr=self._stderr, say=say)
        self.process = self._context.Process(target=exec, args=(PROCESS, names), daemon=True)
        self.process.start()
        say.close()
        assert self.hear() == "ready"

    def hear(self):
        assert self._hear.poll(60), "nothing heard for a minute"
        return self._hear.recv()

    def stderr(self, lines):
        """Returns the first lines of the process's stderr, once there are that many."""
        deadline = time.monotonic() + 60
        while (text := self._stderr.read_text() if self._stderr.exists() else "").count("\n") < lines:
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        return text.splitlines()[:lines]

    def end(self):
        self.process.join(60)
        return self.process.exitcode


def entries(cache):
    return [p for p in cache.iterdir() if p.is_dir()]


@pytest.fixture
def count_quantizations(monkeypatch):
    calls = []

    def counted(src, dst, **kwargs):
        calls.append(dst)
        return quantize_checkpoint(src, dst, **kwargs)

    monkeypatch.setattr(cache_module, "quantize_checkpoint", counted)
    return calls


# --- once ---


def test_quantized_once_then_found(make_checkpoint, tmp_path, count_quantizations, monkeypatch):
    src, cache = make_checkpoint(), tmp_path / "cache"
    first = resolve_checkpoint(src, cache, progress=False)
    assert (first.kind, first.source, first.path.parent) == ("quantized", str(src), cache)
    validate_nvfp4_checkpoint(first.path)
    # the second call hashes no source file and quantizes nothing
    sha256, hashed = hashlib.sha256, []
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append(data) or sha256(*data))
    assert resolve_checkpoint(str(src), cache, progress=False) == first
    assert len(count_quantizations) == 1
    assert len(hashed) == 1  # the key


def test_same_content_elsewhere_is_the_same_entry(make_checkpoint, tmp_path, count_quantizations):
    first = resolve_checkpoint(make_checkpoint(name="here"), tmp_path / "cache", progress=False)
    second = resolve_checkpoint(make_checkpoint(name="there"), tmp_path / "cache", progress=False)
    assert second.path == first.path and len(count_quantizations) == 1


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_changed_content_is_another_entry(make_checkpoint, tmp_path, file):
    src = make_checkpoint()
    first = resolve_checkpoint(src, tmp_path / "cache", progress=False)
    data = (src / file).read_bytes()
    stat = (src / file).stat()
    # one character more, or one byte of the weights' last tensor, with the same size and another
    # modification time
    data = data[:-1] + bytes([data[-1] ^ 1]) if file == "model.safetensors" else data + b" "
    (src / file).write_bytes(data)
    os.utime(src / file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    second = resolve_checkpoint(src, tmp_path / "cache", progress=False)
    assert second.path != first.path
    assert first.path.exists() and second.path.exists()


def test_another_format_version_is_another_entry(make_checkpoint, tmp_path, monkeypatch):
    src = make_checkpoint()
    first = resolve_checkpoint(src, tmp_path / "cache", progress=False)
    monkeypatch.setattr(cache_module, "FORMAT_VERSION", 10**6)
    assert resolve_checkpoint(src, tmp_path / "cache", progress=False).path != first.path


def test_lost_digests_only_cost_time(make_checkpoint, tmp_path, count_quantizations):
    src, cache = make_checkpoint(), tmp_path / "cache"
    first = resolve_checkpoint(src, cache, progress=False)
    for content in ("not json", "[1]", json.dumps({str(src / "config.json"): "nonsense"})):
        (cache / "digests.json").write_text(content)
        assert resolve_checkpoint(src, cache, progress=False) == first
    assert len(count_quantizations) == 1
    # five files, and the entry's weights
    assert len(json.loads((cache / "digests.json").read_text())) == 6


def test_nvfp4_is_used_as_it_is(make_checkpoint, tmp_path):
    quantize_checkpoint(make_checkpoint(), tmp_path / "nvfp4", progress=False)
    resolved = resolve_checkpoint(tmp_path / "nvfp4", tmp_path / "cache", progress=False)
    assert (resolved.kind, resolved.path) == ("as_is", tmp_path / "nvfp4")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "nvfp4" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="fetch it again"):
        resolve_checkpoint(tmp_path / "nvfp4", tmp_path / "cache", progress=False)


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QERL_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("QERL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "qerl_verl"


# --- processes ---


def test_concurrent_processes(make_checkpoint, tmp_path):
    """One process quantizes. The others wait for it, name it, and get the same folder."""
    src, cache, gate = make_checkpoint(), tmp_path / "cache", tmp_path / "gate"
    worker = Process(src, cache, gate)
    assert worker.hear() == "quantizing"
    waiting = [Process(src, cache, gate) for _ in range(3)]
    for process in waiting:
        first, second = process.stderr(2)
        for line in (first, second):
            assert f"waiting for process {worker.process.pid} on {host_name()}" in line and "s so far" in line
    gate.touch()
    paths = {process.hear() for process in waiting}  # none of them prints "quantizing"
    while (path := worker.hear()) == "quantizing":
        pass
    assert [process.end() for process in (worker, *waiting)] == [0, 0, 0, 0]
    assert {path} == paths == set(entries(cache))
    validate_nvfp4_checkpoint(path)


def test_killed_while_quantizing(make_checkpoint, tmp_path):
    """kill -9 leaves nothing that is used; the waiting process takes over, cleans up, and
    succeeds."""
    src, cache, gate = make_checkpoint(), tmp_path / "cache", tmp_path / "gate"
    victim = Process(src, cache, gate)
    assert victim.hear() == "quantizing"
    (temporary,) = entries(cache)
    assert ".tmp-" in temporary.name and any(temporary.iterdir())
    heir = Process(src, cache, gate)
    assert f"waiting for process {victim.process.pid}" in heir.stderr(1)[0]
    victim.process.kill()
    assert victim.end() == -signal.SIGKILL
    assert heir.hear() == "quantizing"
    assert temporary not in entries(cache)
    gate.touch()
    while (path := heir.hear()) == "quantizing":
        pass
    assert heir.end() == 0
    assert entries(cache) == [path]
    quantize_checkpoint(src, tmp_path / "undisturbed", progress=False)
    for file in (tmp_path / "undisturbed").iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_another_node_was_faster(make_checkpoint, tmp_path, monkeypatch):
    """Without working locks two nodes quantize at once. The later rename fails, and the first entry
    is used."""
    src, cache = make_checkpoint(), tmp_path / "cache"
    write = quantize_module.write_weights

    def interrupted(*args):
        monkeypatch.setattr(quantize_module, "write_weights", write)
        (entry,) = entries(cache)
        quantize_checkpoint(src, cache / entry.name.partition(".tmp-")[0], progress=False)
        return write(*args)

    monkeypatch.setattr(quantize_module, "write_weights", interrupted)
    resolved = resolve_checkpoint(src, cache, progress=False)
    assert entries(cache) == [resolved.path]
    validate_nvfp4_checkpoint(resolved.path)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_gone_on_with(make_checkpoint, tmp_path, monkeypatch, capsys, error):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    src, cache = make_checkpoint(), tmp_path / "cache"
    resolved = resolve_checkpoint(src, cache, progress=False)
    validate_nvfp4_checkpoint(resolved.path)
    assert f"cannot be locked ({os.strerror(error)}); going on without" in capsys.readouterr().err
    assert sorted(p.suffix for p in cache.iterdir() if p.is_file()) == [".json", ".lock"]


def test_another_users_lock_file_is_no_end(make_checkpoint, tmp_path, monkeypatch, capsys):
    opened = os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    resolve_checkpoint(make_checkpoint(), tmp_path / "cache", progress=False)
    assert "cannot be locked (Permission denied)" in capsys.readouterr().err


def test_failure_leaves_nothing_and_can_be_repeated(make_checkpoint, tmp_path, monkeypatch):
    src, cache = make_checkpoint(), tmp_path / "cache"
    monkeypatch.setattr(quantize_module, "copy_file", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="was full"):
        resolve_checkpoint(src, cache, progress=False)
    assert entries(cache) == []
    monkeypatch.undo()
    validate_nvfp4_checkpoint(resolve_checkpoint(src, cache, progress=False).path)


# --- integrity ---


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_entry(make_checkpoint, tmp_path, file, damage):
    src, cache = make_checkpoint(), tmp_path / "cache"
    entry = resolve_checkpoint(src, cache, progress=False).path
    if damage == "truncated":
        os.truncate(entry / file, (entry / file).stat().st_size - 1)
    else:
        (entry / file).unlink()
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint(src, cache, progress=False)
    assert str(entry / file) in str(error.value) and f"With the folder {entry} moved elsewhere" in str(error.value)
    entry.rename(tmp_path / "elsewhere")
    assert resolve_checkpoint(src, cache, progress=False).path == entry


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": {"config.json": 3}}'])
def test_damaged_manifest(make_checkpoint, tmp_path, content):
    src, cache = make_checkpoint(), tmp_path / "cache"
    entry = resolve_checkpoint(src, cache, progress=False).path
    (entry / "qerl_manifest.json").unlink() if content is None else (entry / "qerl_manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"With the folder {entry} moved elsewhere"):
        resolve_checkpoint(src, cache, progress=False)


def flip_last_byte(file):
    """Changes the content in place without changing the size."""
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))


def test_fingerprint_follows_the_weights_and_nothing_else(make_checkpoint, tmp_path):
    src, cache = make_checkpoint(), tmp_path / "cache"
    entry = resolve_checkpoint(src, cache, progress=False).path
    before = fingerprint(entry, cache)
    copy = shutil.copytree(entry, tmp_path / "moved")
    (copy / "tokenizer.json").write_text("{}")
    assert fingerprint(copy, cache) == before
    (copy / "qerl_manifest.json").unlink()  # as in a checkpoint of llm-compressor
    assert fingerprint(copy, cache) == before


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("times", ["new", "set back"])
def test_weights_that_are_replaced_in_place_have_another_fingerprint(
    make_checkpoint, tmp_path, monkeypatch, manifest, times
):
    """The checkpoint is ours or another tool's, and a copy may restore the old modification
    time."""
    cache, folder = tmp_path / "cache", tmp_path / "nvfp4"
    quantize_checkpoint(make_checkpoint(), folder, progress=False)
    if not manifest:
        (folder / "qerl_manifest.json").unlink()
    before, stat = fingerprint(folder, cache), (folder / "model.safetensors").stat()
    sha256, hashed = hashlib.sha256, []
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", lambda *data: hashed.append(data) or sha256(*data))
        assert fingerprint(folder, cache) == before
    assert len(hashed) == 1  # the fingerprint; the file is known
    flip_last_byte(folder / "model.safetensors")
    if times == "set back":
        os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(folder, cache) != before
    flip_last_byte(folder / "model.safetensors")
    assert fingerprint(folder, cache) == before


def test_weights_of_an_entry_that_are_replaced_in_place_are_noticed(make_checkpoint, tmp_path):
    src, cache = make_checkpoint(), tmp_path / "cache"
    entry = resolve_checkpoint(src, cache, progress=False).path
    flip_last_byte(entry / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: its content is not what was written"):
        resolve_checkpoint(src, cache, progress=False)


def test_what_was_just_quantized_is_not_hashed_again(make_checkpoint, tmp_path, monkeypatch):
    src, cache = make_checkpoint(), tmp_path / "cache"
    entry = resolve_checkpoint(src, cache, progress=False).path
    sha256, hashed = hashlib.sha256, []
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append(data) or sha256(*data))
    fingerprint(entry, cache)
    assert len(hashed) == 1  # the fingerprint


# --- sources ---


def test_unusable_sources_fail_before_they_are_hashed(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_content_key", lambda *a: pytest.fail("hashed"))
    moe = make_checkpoint(name="moe")
    config = json.loads((moe / "config.json").read_text()) | {"architectures": ["DeepseekV3ForCausalLM"]}
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedArchitecture, match="DeepseekV3ForCausalLM"):
        resolve_checkpoint(moe, tmp_path / "cache")
    broken = make_checkpoint(name="broken", shards=True)
    next(broken.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        resolve_checkpoint(broken, tmp_path / "cache")


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "../up"])
def test_a_path_is_not_looked_up_on_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve_checkpoint(model, tmp_path)


def hub_folder(root, model):
    """Returns the hub's cache layout: blobs named by their hash, and a snapshot of links."""
    base = root / "models--made--up"
    snapshot = base / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (base / "blobs").mkdir()
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("0" * 40)
    for file in model.iterdir():
        data = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        (base / "blobs" / name).write_bytes(data)
        (snapshot / file.name).symlink_to(base / "blobs" / name)
    return base


OFFLINE = """
import sys
from qerl_verl.nvfp4 import cache
for name in sys.argv[2:]:
    try:
        resolved = cache.resolve_checkpoint(name, sys.argv[1], progress=False)
        print(resolved.kind, (resolved.path / "tokenizer.json").read_text())
    except cache.CheckpointError as error:
        print(error)
"""


def test_hub_name_offline(make_checkpoint, tmp_path):
    hub_folder(tmp_path / "hub", make_checkpoint())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = [sys.executable, "-c", OFFLINE, str(tmp_path / "cache"), "made/up", "made/up-not"]
    found, missing, *_ = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == 'quantized {"made": "up"}'
    assert missing.startswith("made/up-not: no such folder") and "HF_HUB_OFFLINE is set" in missing
    digests = json.loads((tmp_path / "cache" / "digests.json").read_text())
    digests = [name for name in digests if not name.startswith(str(tmp_path / "cache"))]
    assert len(digests) == 4  # of five files: the large one is named by its hash
    assert len(entries(tmp_path / "cache")) == 1


def test_hub_downloads_only_what_is_needed(make_checkpoint, tmp_path, monkeypatch):
    src = make_checkpoint()
    asked = []

    def snapshot_download(model, allow_patterns, ignore_patterns=()):
        asked.append((model, list(allow_patterns), list(ignore_patterns)))
        return str(src)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolved = resolve_checkpoint("made/up", tmp_path / "cache", progress=False)
    assert resolved.source == "made/up" and resolved.kind == "quantized"
    (first, first_patterns, _), (second, patterns, ignored) = asked
    assert first == second == "made/up" and first_patterns == ["config.json"]
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(patterns) and "*.bin" not in patterns
    assert "consolidated*" in ignored


def test_an_unusable_hub_model_is_not_downloaded(make_checkpoint, tmp_path, monkeypatch):
    src = make_checkpoint()
    (src / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(src))
    with pytest.raises(UnsupportedArchitecture):
        resolve_checkpoint("made/up", tmp_path / "cache")
    assert asked == [{"allow_patterns": ["config.json"]}]


@pytest.mark.parametrize(
    "files, refused",
    [
        (["config.json", "pytorch_model.bin"], True),
        (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], True),
        (["config.json", "consolidated.00.pth"], True),
        (["config.json", "pytorch_model.bin", "model.safetensors"], False),
        (None, False),  # the hub cannot be reached
    ],
)
def test_a_hub_model_of_pickles_alone_is_refused_before_it_is_downloaded(
    make_checkpoint, tmp_path, monkeypatch, files, refused
):
    src, asked = make_checkpoint(), []

    def list_repo_files(model):
        if files is None:
            raise OSError("no network")
        return files

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or str(src))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    if refused:
        with pytest.raises(CheckpointError, match="made/up on the Hugging Face hub holds PyTorch pickles .*save_pretr"):
            resolve_checkpoint("made/up", tmp_path / "cache", progress=False)
    else:
        resolve_checkpoint("made/up", tmp_path / "cache", progress=False)
    assert len(asked) == (1 if refused else 2)

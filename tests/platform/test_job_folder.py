"""Tests that a job's files on a host are removed at its end, and that the files of others stay."""

import errno
import inspect
import logging
import mmap
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from qerl_verl.ownership import Owner
from qerl_verl.platform import job_folder


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Provides folders for temporary files and for shared memory."""
    temporary, memory = tmp_path / "tmp", tmp_path / "shm"
    temporary.mkdir()
    memory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", memory)
    monkeypatch.setattr(job_folder.atexit, "register", lambda *args: None)
    return temporary, memory


@pytest.fixture
def mapped(host):
    """Maps a segment into this process."""
    path = host[1] / "psm_mine"
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        yield path


def segment(host, name):
    """Makes a segment and returns its line in a note."""
    (host[1] / name).write_bytes(b"x")
    return f"{name} {(host[1] / name).stat().st_ino}"


def test_a_worker_notes_message_queues_and_the_end_removes_those_that_nobody_uses(host, mapped, monkeypatch):
    folder = job_folder.open_job_folder()
    monkeypatch.setenv(job_folder.JOB_FOLDER_ENV, str(folder))
    ours = f"{job_folder.JOB_FOLDER_ENV}={folder}".encode()
    monkeypatch.setattr(job_folder, "_environment", lambda process: [ours] if process == os.getpid() else [])
    job_folder.note_segments()
    assert (folder / "segments" / str(os.getpid())).read_text() == f"psm_mine {mapped.stat().st_ino}"
    noted = [segment(host, name) for name in ("psm_gone", "verl_weights_gone", "plasma")]
    segment(host, "psm_another_jobs")
    again = segment(host, "psm_same_name_again").partition(" ")[0] + " 1"
    (folder / "segments" / "1").write_text("\n".join([*noted, again, "../tmp 1", "psm_missing 1", "psm_gone", ""]))
    job_folder.close_job_folder(folder, patience=0.0)
    assert not folder.exists()
    stay = ["plasma", "psm_another_jobs", "psm_mine", "psm_same_name_again"]
    assert sorted(p.name for p in host[1].iterdir()) == stay


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_folder_for_temporary_files_does_not_end_a_weight_sync(host, mapped, monkeypatch, error):
    lines = []
    monkeypatch.setattr(job_folder.logger, "warning", lambda text, *arguments: lines.append(text % arguments))
    folder = job_folder.open_job_folder()
    monkeypatch.setenv(job_folder.JOB_FOLDER_ENV, str(folder))

    def fails(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "write_text", fails)
    job_folder.note_segments()
    assert any(os.strerror(error) in line and "the run goes on" in line for line in lines)
    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr(Path, "unlink", fails)
    (folder / "segments" / "1").touch()
    job_folder.close_job_folder(folder, patience=0.0)
    assert not folder.exists()


def test_a_warning_comes_also_where_a_library_raised_the_level_of_all_loggers(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.ERROR)
    root.manager._clear_cache()
    assert job_folder.logger.isEnabledFor(logging.WARNING)
    root.manager._clear_cache()


def test_a_folder_that_cannot_be_finished_is_an_error_and_leaves_nothing(host, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="No space left"):
        job_folder.open_job_folder()
    assert not list(host[0].iterdir())


def test_a_process_of_the_job_is_known_by_its_environment(tmp_path):
    variable = f"{job_folder.JOB_FOLDER_ENV}={tmp_path}"
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, job_folder.JOB_FOLDER_ENV: str(tmp_path)})
    try:
        # not yet the new program
        while Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0] != b"sleep":
            pass
        assert child.pid in job_folder._processes() and variable.encode() in job_folder._environment(child.pid)
        assert variable.encode() not in job_folder._environment(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert job_folder._environment(child.pid) == []


def test_without_a_folder_nothing_is_noted(host, mapped, monkeypatch):
    monkeypatch.delenv(job_folder.JOB_FOLDER_ENV, raising=False)
    job_folder.note_segments()
    assert not list(host[0].iterdir())


HERE = {}
OTHER_HOST = {"host": "another-node"}
OTHER_BOOT = {"boot": "11111111-2222-3333-4444-555555555555"}
OTHER_CONTAINER = {"namespaces": "pid:[4026532999]"}


@pytest.mark.parametrize(
    ("where", "lives", "stays"),
    [
        (HERE, True, True),
        (HERE, False, False),
        (OTHER_HOST, True, True),
        (OTHER_HOST, False, True),
        (OTHER_BOOT, False, True),
        (OTHER_CONTAINER, True, True),
        (OTHER_CONTAINER, False, True),
        ({"start": "1"}, True, False),  # the number was given away again
        (None, False, True),  # killed before it said whose it is
    ],
)
def test_the_next_job_removes_what_a_dead_driver_left_and_nothing_else(host, where, lives, stays):
    """Folder and segments are removed, also where hosts or containers share the folder for
    temporary files and ``/dev/shm``.
    """
    folder = host[0] / f"{job_folder.PREFIX}other"
    (folder / "segments").mkdir(parents=True)
    (folder / "segments" / "1").write_text(segment(host, "psm_other"))
    if where is not None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        replace(Owner.current(), **({} if lives else {"process": gone.pid}), **where).write(folder / "owner")
    opened = job_folder.open_job_folder()
    assert sorted(host[0].glob(f"{job_folder.PREFIX}*")) == sorted([folder, opened] if stays else [opened])
    assert [p.name for p in host[1].iterdir()] == (["psm_other"] if stays else [])


def test_a_folder_of_another_user_stays(host, monkeypatch):
    folder = host[0] / f"{job_folder.PREFIX}other"
    folder.mkdir()
    replace(Owner.current(), start="1").write(folder / "owner")
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    job_folder.open_job_folder()
    assert folder.exists()


def test_the_folder_goes_with_the_process_that_opened_it(tmp_path):
    code = "from qerl_verl.platform.job_folder import open_job_folder; print(open_job_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent == tmp_path and not list(tmp_path.glob(f"{job_folder.PREFIX}*"))


def test_the_environment_keeps_the_compilers_cache_where_it_was(host, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = job_folder.environment(Path("/f"))
    assert found["TMPDIR"] == found[job_folder.JOB_FOLDER_ENV] == "/f"
    assert found["TORCHINDUCTOR_CACHE_DIR"].startswith(str(host[0] / "torchinductor_"))
    assert found["RAY_TMPDIR"] == str(host[0])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept")
    assert job_folder.environment(Path("/f"))["TORCHINDUCTOR_CACHE_DIR"] == "/kept"


def test_the_compilers_default_cache_is_the_same_inside_and_stays(host, monkeypatch):
    """TorchInductor keeps compiled C++ headers there, whose compilation takes five seconds."""
    from torch._inductor.codecache import _HEADER_DIR
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert Path(_HEADER_DIR).parent.name == Path(default_cache_dir()).name
    outside = Path(default_cache_dir())
    folder = job_folder.open_job_folder()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    inside = Path(default_cache_dir())
    (inside / "header").touch()
    assert inside.parent == folder and (outside / "header").exists()
    job_folder.close_job_folder(folder)
    assert not folder.exists() and (outside / "header").exists()


def test_vllm_and_verl_put_their_files_into_the_folder_for_temporary_files():
    """Fails when they choose another place, which the job's end would not clean."""
    from verl.utils import fs
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
    from vllm import envs
    from vllm.distributed.device_communicators import shm_broadcast

    assert "tempfile.gettempdir()" in inspect.getsource(fs.local_mkdir_safe)
    assert "tempfile.gettempdir()" in inspect.getsource(envs)
    assert "shared_memory.SharedMemory(" in inspect.getsource(shm_broadcast)
    assert 'f"verl_weights_{' in inspect.getsource(BucketedWeightSender._init_buffer)

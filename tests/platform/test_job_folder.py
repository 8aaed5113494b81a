"""What a job leaves on a host goes when it ends, and what is somebody else's stays."""

import inspect
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qerl_verl.platform import job_folder


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Folders for temporary files and for shared memory."""
    temporary, memory = tmp_path / "tmp", tmp_path / "shm"
    temporary.mkdir()
    memory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(job_folder, "SHARED_MEMORY", memory)
    monkeypatch.setattr(job_folder.atexit, "register", lambda *args: None)
    return temporary, memory


@pytest.fixture
def mapped(host):
    """A segment that this process uses."""
    path = host[1] / "psm_mine"
    path.write_bytes(b"x" * 4096)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        yield path


def test_a_worker_notes_message_queues_and_the_end_removes_those_that_nobody_uses(host, mapped, monkeypatch):
    folder = job_folder.open_job_folder()
    monkeypatch.setenv(job_folder.JOB_FOLDER_ENV, str(folder))
    ours = f"{job_folder.JOB_FOLDER_ENV}={folder}".encode()
    monkeypatch.setattr(job_folder, "_environment", lambda process: [ours] if process == os.getpid() else [])
    job_folder.note_segments()
    assert (folder / "segments" / str(os.getpid())).read_text() == "psm_mine"
    for name in ("psm_gone", "psm_another_jobs", "plasma"):
        (host[1] / name).write_bytes(b"x")
    (folder / "segments" / "1").write_text("psm_gone\nplasma\n../tmp\npsm_missing")
    job_folder.close_job_folder(folder, patience=0.0)
    assert not folder.exists()
    assert sorted(p.name for p in host[1].iterdir()) == ["plasma", "psm_another_jobs", "psm_mine"]


def test_a_process_of_the_job_is_known_by_its_environment(tmp_path):
    variable = f"{job_folder.JOB_FOLDER_ENV}={tmp_path}"
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, job_folder.JOB_FOLDER_ENV: str(tmp_path)})
    try:
        while Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0] != b"sleep":  # not yet the new program
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


def test_the_next_job_removes_what_a_killed_driver_left_and_nothing_else(host):
    dead, living, unfinished = (host[0] / f"{job_folder.PREFIX}{n}" for n in ("dead", "living", "unfinished"))
    for folder in (dead, living, unfinished):
        (folder / "segments").mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (dead / "owner").write_text(f"{gone.pid} 1")
    (dead / "segments" / "1").write_text("psm_dead")
    (host[1] / "psm_dead").write_bytes(b"x")
    (living / "owner").write_text(f"{os.getpid()} {job_folder._start_time(os.getpid())}")
    opened = job_folder.open_job_folder()
    assert sorted(host[0].iterdir()) == sorted([living, unfinished, opened])
    assert not list(host[1].iterdir())


def test_a_process_number_that_was_given_away_again_is_not_the_owner(host):
    folder = host[0] / f"{job_folder.PREFIX}old"
    folder.mkdir()
    (folder / "owner").write_text(f"{os.getpid()} 1")
    assert job_folder._is_dead(folder)


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


def test_vllm_and_verl_put_their_files_into_the_folder_for_temporary_files():
    """Fails when they choose another place, where the job's end would not find them."""
    from verl.utils import fs
    from vllm import envs
    from vllm.distributed.device_communicators import shm_broadcast

    assert "tempfile.gettempdir()" in inspect.getsource(fs.local_mkdir_safe)
    assert "tempfile.gettempdir()" in inspect.getsource(envs)
    assert "shared_memory.SharedMemory(" in inspect.getsource(shm_broadcast)

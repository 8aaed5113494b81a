"""Tests when an engine of the rollout uses vLLM's cache of compiled graphs, and which folder."""

import argparse
import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from qerl_verl.config.settings import QeRLSettings, RolloutSettings
from qerl_verl.job import Job, RolloutLayers
from qerl_verl.rollout import compile_cache as module
from qerl_verl.rollout.compile_cache import DISABLE, MARK, ROOT, STARTING, compile_cache
from qerl_verl.rollout.server import QeRLHttpServer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Returns the folder of vLLM's caches, in the environment that verl's processes have."""
    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setenv(DISABLE, "1")
    monkeypatch.delenv(ROOT, raising=False)
    return tmp_path / "vllm"


def variables():
    return os.environ.get(DISABLE), os.environ.get(ROOT)


def test_verl_turns_the_cache_off():
    """Where verl no longer does, this setting is of no use."""
    from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV

    assert PPO_RAY_RUNTIME_ENV["env_vars"][DISABLE] == "1"


def test_vllm_reads_the_variables_when_an_engine_starts(cache):
    from vllm import envs

    assert envs.VLLM_DISABLE_COMPILE_CACHE
    with compile_cache("replica_0_0"):
        assert not envs.VLLM_DISABLE_COMPILE_CACHE and Path(envs.VLLM_CACHE_ROOT).is_relative_to(cache)


def test_an_engine_finds_again_what_it_left(cache):
    with compile_cache("replica_0_0") as folder:
        assert variables() == ("0", str(folder)) and folder.is_relative_to(cache)
        (folder / "compiled").touch()
    assert variables() == ("1", None) and not (folder / STARTING).exists()
    with compile_cache("replica_1_0") as other:
        assert other != folder and not (other / "compiled").exists()
    with compile_cache("replica_0_0") as again:
        assert again == folder and (folder / "compiled").exists()


def test_a_start_that_failed_leaves_nothing_to_the_next(cache):
    with pytest.raises(RuntimeError, match="killed"), compile_cache("replica_0_0") as folder:
        (folder / "half").touch()
        raise RuntimeError("killed")
    assert variables() == ("1", None)
    with compile_cache("replica_0_0") as again:
        assert again == folder and not (folder / "half").exists()


def test_two_runs_do_not_start_with_one_folder(capsys):
    with compile_cache("replica_0_0"):
        taken = variables()
        os.environ[DISABLE] = "1"  # another process has its own variables
        del os.environ[ROOT]
        with compile_cache("replica_0_0") as none:
            assert none is None and variables() == ("1", None)
        os.environ[DISABLE], os.environ[ROOT] = taken
    assert "an engine of another run starts with it" in capsys.readouterr().out


def test_other_sources_have_another_folder_and_old_ones_go(cache, monkeypatch):
    """vLLM's own cache may be in the same folder, and stays."""
    old, recent, vllms = (cache / name for name in ("old", "recent", "torch_compile_cache"))
    for folder, days in ((old, 31), (recent, 29), (vllms, 31)):
        folder.mkdir(parents=True)
        used = time.time() - days * 86400
        if folder != vllms:
            (folder / MARK).touch()
            os.utime(folder / MARK, (used, used))
        os.utime(folder, (used, used))
    with compile_cache("replica_0_0") as folder:
        pass
    monkeypatch.setattr(module, "hash_sources", lambda: "other")
    with compile_cache("replica_0_0") as other:
        assert other != folder and folder.exists() and recent.exists() and vllms.exists() and not old.exists()


def test_the_hash_covers_the_package_and_its_kernels(tmp_path, monkeypatch):
    packages = [tmp_path / name / "__init__.py" for name in ("qerl_verl", "kernels")]
    for file in packages:
        file.parent.mkdir()
        file.touch()
    both = SimpleNamespace(__file__=str(packages[0]), kernels=SimpleNamespace(__file__=str(packages[1])))
    monkeypatch.setattr(module, "qerl_verl", both)
    hashes = []
    for text in ("1", "2"):
        for file in packages:
            (file.parent / "layer.py").write_text(text)
            hashes.append(module.hash_sources.__wrapped__())
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("chosen", [{DISABLE: "0"}, {ROOT: "/theirs"}])
def test_what_the_user_has_chosen_stays(monkeypatch, chosen):
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    before = variables()
    with compile_cache("replica_0_0") as folder:
        assert folder is None and variables() == before


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path / "file"))
    with compile_cache("replica_0_0") as folder:
        assert folder is None and variables() == ("1", None)
    assert "[qerl] vLLM compiles without its cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "eager", "ours", "used"),
    [(True, False, True, True), (False, False, True, False), (True, True, True, False), (True, False, False, False)],
)
def test_a_server_starts_its_engine_with_the_cache_where_the_setting_asks(monkeypatch, setting, eager, ours, used):
    job = Job(QeRLSettings(rollout=RolloutSettings(compile_cache=setting)))
    monkeypatch.setattr("qerl_verl.rollout.server.find_job", lambda: job)
    seen = []

    async def verls(self, args):
        seen.append(variables())

    async def end_with_engine(self):
        pass

    monkeypatch.setattr(vLLMHttpServer, "run_server", verls)
    monkeypatch.setattr(QeRLHttpServer, "_end_with_engine", end_with_engine)
    made = QeRLHttpServer.__new__(QeRLHttpServer)
    vllm = RolloutLayers().additional_config() if ours else {}
    made.config = {"engine_kwargs": {"vllm": {"additional_config": vllm}}, "enforce_eager": eager}
    made.replica_rank, made.node_rank, made.engine = 2, 0, SimpleNamespace(errored=False)
    asyncio.run(made.run_server(argparse.Namespace(api_key=["mine"])))
    ((disabled, root),) = seen
    assert (disabled == "0" and root.endswith("replica_2_0")) if used else (disabled, root) == ("1", None)

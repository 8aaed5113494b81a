"""Tests what shortens a job's start, and that the driver's side imports few packages."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from qerl_verl.config import callback
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.platform import start

IMPORTS = """
import importlib, json, sys
found, before = {}, set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    new = {m.partition(".")[0] for m in set(sys.modules) - before}
    found[name] = sorted(new & {"torch", "transformers", "verl", "vllm", "ray", "peft", "safetensors"})
print(json.dumps(found))
"""
DRIVER = (
    "qerl_verl",
    "qerl_verl.switch",
    "qerl_verl.config.plan",
    "qerl_verl.config.callback",
    "qerl_verl.platform.start",
    "qerl_verl.cli.main",
)
"""What the driver imports of ours before it knows what a run needs."""


@pytest.fixture(scope="module")
def imported():
    """Returns, for each of our modules, the heavy packages that its import loads in a new
    Python."""
    command = [sys.executable, "-c", IMPORTS, *DRIVER, "qerl_verl.plugin"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", DRIVER)
def test_the_driver_checks_a_run_without_heavy_imports(imported, module):
    assert imported[module] == []


def test_the_plugin_needs_ray_alone(imported):
    """The plugin needs Ray to know whether it is in a Ray worker; verl, which loads the plugin, has
    imported Ray.
    """
    assert imported["qerl_verl.plugin"] == ["ray"]


def test_rays_idle_workers_are_off_unless_the_user_wants_them():
    environment = {}
    start.set_ray_environment(environment)
    assert environment == {"RAY_prestart_worker_first_driver": "0"}
    environment = {"RAY_prestart_worker_first_driver": "1"}
    start.set_ray_environment(environment)
    assert environment == {"RAY_prestart_worker_first_driver": "1"}


def test_an_installed_package_counts_as_compiled_by_its_own_file(tmp_path, monkeypatch):
    for name in ("torch", "verl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.setattr(start, "PACKAGES", ("torch", "verl", "absent"))
    monkeypatch.setattr(start, "find_spec", lambda name: spec_of(tmp_path / name / "__init__.py"))
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "elsewhere"))
    (tmp_path / "verl" / "__pycache__").mkdir()
    (tmp_path / "verl" / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc").touch()
    assert start.find_uncompiled() == ["torch"]


def spec_of(source):
    from importlib.machinery import ModuleSpec

    return ModuleSpec(source.parent.name, None, origin=str(source)) if source.exists() else None


@pytest.mark.parametrize(
    ("uncompiled", "environment", "writable", "acts"),
    [
        ([], {"PYTHONDONTWRITEBYTECODE": "1"}, True, False),  # all there
        (["torch"], {}, True, False),  # the first process writes them beside the sources
        # Python's own reading of an empty value
        (["torch"], {"PYTHONDONTWRITEBYTECODE": ""}, True, False),
        (["torch"], {"PYTHONDONTWRITEBYTECODE": "1"}, True, True),
        (["torch"], {}, False, True),
        (["torch"], {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/x"}, True, False),
    ],
)
def test_compiled_modules_are_kept_where_each_process_would_compile_again(
    tmp_path, monkeypatch, uncompiled, environment, writable, acts
):
    monkeypatch.setattr(start.os, "access", lambda path, mode: writable)
    variables, line = start.bytecode_environment(tmp_path, environment, uncompiled)
    if acts:
        assert variables == {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
        assert "torch" in line and str(tmp_path / "bytecode") in line
    else:
        assert (variables, line) == ({}, "")


def test_python_keeps_and_finds_modules_with_these_variables(tmp_path):
    """A job's process does this with them: the second process reads what the first one compiled."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "module.py").write_text("x = 1\n")
    variables, _ = start.bytecode_environment(tmp_path, {"PYTHONDONTWRITEBYTECODE": "1"}, ["torch"])
    code = "import module; print(module.__cached__)"
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path / "source"), **variables}
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    cached = run.stdout.strip()
    assert cached.startswith(str(tmp_path / "bytecode")) and list((tmp_path / "bytecode").rglob("module.*.pyc"))


def test_the_jobs_processes_get_the_variables_and_the_users_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "find_uncompiled", lambda: ["torch"])
    monkeypatch.setattr(start.os, "access", lambda path, mode: False)
    monkeypatch.setattr(start, "RAY_ENVIRONMENT", {})
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    mine = {"ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"PYTHONDONTWRITEBYTECODE": "1", "A": "b"}}}}}
    config = OmegaConf.create(mine)
    callback.shorten_start(config, QeRLSettings(cache_dir=str(tmp_path)))
    assert dict(config.ray_kwargs.ray_init.runtime_env.env_vars) == {
        "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "A": "b",
    }
    assert "[qerl] start: torch came without compiled modules" in capsys.readouterr().out

"""What is installed is what the checkout has."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import setuptools

import qerl_verl

ROOT = Path(__file__).parents[1]
TOPS = {"qerl_verl": "qerl_verl", "kernels": "qerl_verl/kernels", "recipes": "qerl_verl/recipes"}
"""Folders of the checkout whose files are installed, and where to."""

HYDRA_PLUGIN = "qerl_verl/config/hydra_plugins"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def files(top: str) -> list[Path]:
    """Returns what a checkout has in a folder, but for what Python and compilers leave there."""
    found = (p.relative_to(ROOT) for p in (ROOT / top).rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts and p.suffix not in (".pyc", ".so")]


def build(what: str, source: Path, out: Path) -> Path:
    """Returns ``build_sdist`` or ``build_wheel`` of a folder, as pip calls it, without the network."""
    command = [sys.executable, "-c", BUILD, what, str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the unpacked sdist, and the unpacked wheel that is built from it and not from the
    checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "checkout"
    for top in (*TOPS, "docs", "requirements"):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy(file, source)
    sdist = build("build_sdist", source, folder)
    shutil.unpack_archive(sdist, folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    with zipfile.ZipFile(build("build_wheel", unpacked, folder)) as archive:
        archive.extractall(folder / "wheel")
    return unpacked, folder / "wheel"


def test_sdist_and_wheel_hold_what_they_must(wheel):
    sdist, site = wheel
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/design.md", "requirements/cpu.txt"):
        assert (sdist / name).is_file(), name
    for top, place in TOPS.items():
        for file in files(top):
            inside = file.relative_to(top)
            target = Path(place) / inside
            if file.is_relative_to(HYDRA_PLUGIN):  # a namespace package of Hydra's at the top level
                target = Path("hydra_plugins") / file.relative_to(HYDRA_PLUGIN)
            assert (site / target).is_file(), f"{file} is not installed as {target}"
            assert (site / target).read_bytes() == (ROOT / file).read_bytes()
    assert (site / "qerl_verl/py.typed").is_file()
    unwanted = [p for p in site.iterdir() if p.name not in ("qerl_verl", "hydra_plugins") and p.suffix != ".dist-info"]
    assert unwanted == []


def test_the_metadata(wheel):
    (information,) = wheel[1].glob("*.dist-info")
    metadata = message_from_string((information / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "qerl-verl" and metadata["Version"] == qerl_verl.__version__
    assert metadata["License-Expression"] == "Apache-2.0" or metadata["License"] == "Apache-2.0"
    assert "Apache License" in (information / "licenses" / "LICENSE").read_text()
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    entry_points = (information / "entry_points.txt").read_text()
    for line in ("qerl = qerl_verl.cli.main:main", "qerl = qerl_verl.plugin", "qerl = qerl_verl.plugin:register_vllm"):
        assert line in entry_points.splitlines()
    assert f"## {qerl_verl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


SWITCH = """
import importlib, os, verl
from hydra import compose, initialize_config_dir
folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
with initialize_config_dir(folder, version_base=None):
    config = compose("ppo_trainer", overrides=["+qerl=nvfp4"])
for name in ("qerl_verl", "qerl_verl.kernels", "qerl_verl.recipes", "hydra_plugins.qerl_verl_search_path"):
    print(os.path.dirname(importlib.import_module(name).__file__))
print(config.qerl.aqn.enable)
"""


@pytest.mark.slow
def test_the_wheel_gives_a_working_switch(wheel, tmp_path):
    """In a Python that has the dependencies, where the wheel comes before the checkout."""
    _, site = wheel
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", SWITCH]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    *places, enabled = result.stdout.splitlines()[-5:]
    assert all(Path(place).is_relative_to(site) for place in places) and enabled == "True", places


def test_every_package_of_the_folders_beside_qerl_verl_is_installed(monkeypatch):
    """``setup.py`` lists those by hand, with the files of theirs that are no modules."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    for top in ("kernels", "recipes"):
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            package = "qerl_verl." + ".".join(folder.parts)
            assert package in found["packages"] and found["package_dir"][package] == str(folder), package
            patterns = found["package_data"].get(package, [])
            for file in init.parent.iterdir():
                if file.is_file() and file.suffix not in (".py", ".pyc"):
                    assert any(file.match(pattern) for pattern in patterns), f"{file} is not installed"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_ignores_what_runs_write_and_no_source():
    def ignored(paths):
        command = ["git", "check-ignore", "--no-index", "--stdin"]
        return subprocess.run(command, cwd=ROOT, input="\n".join(paths), capture_output=True, text=True).stdout.split()

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 300 and ignored(tracked) == []
    folders = ("runs", "logs", "checkpoints", "outputs", "build", "data")
    assert ignored(f"benchmarks/results/{folder}/x.json" for folder in folders) == []
    assert ignored(f"qerl_verl/{folder}/x.py" for folder in folders) == []
    written = [f"{folder}/x.json" for folder in folders]
    assert ignored(written) == written

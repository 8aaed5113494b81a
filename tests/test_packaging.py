"""What is installed is what the checkout has, and ``import qerl_verl.kernels`` works in every
form of the tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import qerl_verl

ROOT = Path(__file__).parents[1]
TOPS = {"qerl_verl": "qerl_verl", "kernels": "qerl_verl/kernels", "recipes": "qerl_verl/recipes"}
"""Folders of the checkout whose files are installed, and where to. The last two are links in the
first."""

HYDRA_PLUGIN = "qerl_verl/config/hydra_plugins"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def files(top: str) -> list[Path]:
    """Returns the files of a checkout's folder, without those that Python and compilers leave
    there."""
    found = (p.relative_to(ROOT) for p in (ROOT / top).rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts and p.suffix not in (".pyc", ".so")]


def build(what: str, source: Path, out: Path) -> Path:
    """Runs ``build_sdist`` or ``build_wheel`` on a folder as pip does, without the network."""
    command = [sys.executable, "-c", BUILD, what, str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Maps the name of each form in which the tree is used to a folder that holds it.

    The wheel is built from the unpacked sdist and not from the checkout.
    """
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    for top in (*TOPS, "docs", "requirements"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / top, checkout / top, symlinks=True, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy(file, checkout)
    shutil.unpack_archive(build("build_sdist", checkout, folder), folder / "sdist", filter="data")
    (sdist,) = (folder / "sdist").iterdir()
    for what, source in (("wheel", sdist), ("editable", checkout)):
        with zipfile.ZipFile(build(f"build_{what}", source, folder)) as archive:
            archive.extractall(folder / what)
    return {"checkout": checkout, "sdist": sdist, "wheel": folder / "wheel", "editable": folder / "editable"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Returns the files that ``git archive`` packs."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("archive")
    packed = folder / "archive.tar"
    subprocess.run(["git", "archive", "-o", packed, "HEAD"], cwd=ROOT, check=True)
    shutil.unpack_archive(packed, folder / "archive", filter="data")
    return folder / "archive"


LAYOUT = """
import importlib.util, site, sys
from importlib.resources import files
site.addsitedir(sys.argv[1])
import qerl_verl, qerl_verl.kernels, qerl_verl.recipes
print(qerl_verl.__file__)
print(qerl_verl.kernels.__file__)
for package, file in (("kernels", "hopper/nvfp4_gemm.cu"), ("kernels", "triton/nvfp4_gemm.py"), ("recipes", "study/__init__.py")):
    assert files(f"qerl_verl.{package}").joinpath(file).is_file(), file
assert files("qerl_verl.recipes").joinpath("quickstart_cpu.yaml").is_file()
for name in ("tests", "setup", "qerl_verl", "benchmarks"):
    assert importlib.util.find_spec(f"qerl_verl.{name}") is None, name
"""


@pytest.mark.parametrize("form", ["checkout", "archive", "sdist", "wheel", "editable"])
def test_the_kernels_are_imported_from_every_form_of_the_tree(request, form, tmp_path):
    """The site packages are excluded, because this package may be installed there."""
    folder = request.getfixturevalue("archive" if form == "archive" else "forms")
    folder = folder if form == "archive" else folder[form]
    command = [sys.executable, "-I", "-S", "-c", LAYOUT, str(folder)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    package, kernels = (Path(line) for line in result.stdout.splitlines())
    expected = folder.with_name("checkout") if form == "editable" else folder
    assert package == expected / "qerl_verl/__init__.py" and kernels == expected / "qerl_verl/kernels/__init__.py"


def test_an_sdist_holds_no_links_and_every_file_once(forms):
    assert [p for p in forms["sdist"].rglob("*") if p.is_symlink()] == []
    assert not (forms["sdist"] / "kernels").exists() and not (forms["sdist"] / "recipes").exists()


def test_the_links_are_relative_and_point_to_the_top_level():
    for top in ("kernels", "recipes"):
        assert os.readlink(ROOT / "qerl_verl" / top) == f"../{top}"


def test_sdist_and_wheel_hold_what_they_must(forms):
    sdist, site = forms["sdist"], forms["wheel"]
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


def test_the_metadata(forms):
    (information,) = forms["wheel"].glob("*.dist-info")
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
def test_the_wheel_gives_a_working_switch(forms, tmp_path):
    """The wheel precedes the checkout in a Python that has the dependencies."""
    site = forms["wheel"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", SWITCH]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    *places, enabled = result.stdout.splitlines()[-5:]
    assert all(Path(place).is_relative_to(site) for place in places) and enabled == "True", places


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

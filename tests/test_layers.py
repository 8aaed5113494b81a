"""Tests which part imports which, lazily or not, against docs/design.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {f"qerl_verl.{name}" for name in ("engine", "rollout", "trainer", "plugin", "platform", "cli", "evaluation")}
FORBIDDEN = {
    "kernels": {"verl", "vllm", "ray", "peft", *ABOVE, "qerl_verl.config", "qerl_verl.nvfp4", "qerl_verl.lora"},
    "qerl_verl/nvfp4": {"verl", "vllm", "ray", "peft", *ABOVE, "qerl_verl.config", "qerl_verl.lora", "qerl_verl.aqn"},
    "qerl_verl/lora": {"verl", "vllm", "ray", *ABOVE, "qerl_verl.config", "qerl_verl.aqn"},
    "qerl_verl/aqn": {"verl", "vllm", "ray", *ABOVE},
    "qerl_verl/sharing": {"verl", "vllm", "ray", *ABOVE, "qerl_verl.config"},
    "qerl_verl/memory": {"verl", "vllm", "ray", *ABOVE},
    "qerl_verl/export": {"verl", "vllm", "ray", *ABOVE, "qerl_verl.config"},
    "qerl_verl/compare": {"torch", "verl", "vllm", "ray", *ABOVE, "qerl_verl.config", "qerl_verl.nvfp4"},
    "qerl_verl/config": {"vllm", "qerl_verl.engine", "qerl_verl.rollout", "qerl_verl.cli", "qerl_verl.evaluation"},
    "qerl_verl/engine": {"vllm", "ray", *(f"qerl_verl.{name}" for name in ("rollout", "trainer", "cli", "evaluation"))},
    "qerl_verl/rollout": {f"qerl_verl.{name}" for name in ("engine", "trainer", "cli", "evaluation")},
    "qerl_verl/trainer": {"vllm", "qerl_verl.cli", "qerl_verl.evaluation"},
    "qerl_verl/platform": {f"qerl_verl.{name}" for name in ("engine", "rollout", "trainer", "cli", "evaluation")},
    "qerl_verl/data": {"torch", "vllm", "ray", *ABOVE, "qerl_verl.config", "qerl_verl.nvfp4"},
    "qerl_verl/quickstart": {"verl", "vllm", "ray", "qerl_verl.engine", "qerl_verl.rollout", "qerl_verl.trainer"},
    "qerl_verl/evaluation": {"ray", "qerl_verl.engine", "qerl_verl.trainer", "qerl_verl.cli"},
    "qerl_verl/cli": {"vllm", "qerl_verl.engine", "qerl_verl.rollout", "qerl_verl.trainer"},
}
"""Folder -> what no file in it imports."""

SHARED = {"vllm", "ray", *(name for name in ABOVE if name != "qerl_verl.platform")}
"""What no module beside the folders imports, which all of them may use."""


def imported(source: str) -> set[str]:
    """Returns the modules that a file imports anywhere; for ``from a import b`` both ``a`` and
    ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        # relative imports stay in their package
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def crossings(source: str, forbidden: set[str]) -> set[str]:
    return {name for name in imported(source) for top in forbidden if name == top or name.startswith(f"{top}.")}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_lower_layer_knows_nothing_of_a_higher_one(folder):
    files = list((ROOT / folder).rglob("*.py"))
    found = {str(f.relative_to(ROOT)): crossings(f.read_text(encoding="utf-8"), FORBIDDEN[folder]) for f in files}
    assert files and {name: names for name, names in found.items() if names} == {}


def test_every_folder_has_its_rule():
    folders = {str(f.parent.relative_to(ROOT)) for f in (ROOT / "qerl_verl").glob("*/__init__.py")}
    links = {str(f.relative_to(ROOT)) for f in (ROOT / "qerl_verl").iterdir() if f.is_symlink()}
    assert folders - links == FORBIDDEN.keys() - {"kernels"}


@pytest.mark.parametrize("file", sorted(f.name for f in (ROOT / "qerl_verl").glob("*.py") if f.name != "plugin.py"))
def test_what_all_folders_share_knows_none_of_them(file):
    assert crossings((ROOT / "qerl_verl" / file).read_text(encoding="utf-8"), SHARED) == set()


IN_WORKERS = ("engine", "rollout", "trainer", "platform", "sharing")
"""Folders whose code runs in the processes that a run starts."""


def readings(source: str) -> set[str]:
    """Returns how a file reads the ``qerl`` node of a configuration."""
    names = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.endswith((".qerl", "QeRLSettings.of"))}


def test_the_processes_of_a_run_learn_its_settings_from_the_job_alone():
    """A checkpoint's record also holds what the driver has found out about the run
    (``config.settings.RECORDED``), which is no setting.
    """
    files = [f for folder in IN_WORKERS for f in (ROOT / "qerl_verl" / folder).rglob("*.py")]
    found = {str(f.relative_to(ROOT / "qerl_verl")): readings(f.read_text(encoding="utf-8")) for f in files}
    assert {name: how for name, how in found.items() if how} == {"trainer/resume.py": {"config.qerl"}}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import verl", {"verl"}),
        ("def f():\n    from verl.utils import fs", {"verl.utils", "verl.utils.fs"}),
        ("from qerl_verl import engine", {"qerl_verl.engine"}),
        ("import qerl_verl.engine.nvfp4 as e", {"qerl_verl.engine.nvfp4"}),
        ("import verlite, qerl_verl.engineering", set()),
    ],
)
def test_an_import_is_found_wherever_it_stands(source, expected):
    assert crossings(source, {"verl", "qerl_verl.engine"}) == expected

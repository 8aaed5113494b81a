"""What is installed is what the checkout has."""

import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[1]


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

"""Tests rules for all messages of the package."""

import ast
import re
from pathlib import Path

import pytest

import qerl_verl
import qerl_verl.kernels

FILES = sorted(
    path for package in (qerl_verl, qerl_verl.kernels) for path in Path(package.__file__).parent.rglob("*.py")
)


def texts(tree):
    """Yields line and content of each string of a module that is not a docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "advice", [r"\bdelet(e|ing)\b", r"\brm -", r"\bremove the (file|folder|checkpoint)|not an empty folder.*remove"]
)
def test_no_message_advises_to_delete_a_file(advice):
    """A file that a message takes for broken may be whole, or in use by another node or run."""
    found = [
        f"{path}:{line}: {text}"
        for path in FILES
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if re.search(advice, text, re.IGNORECASE)
    ]
    assert len(FILES) > 60 and not found

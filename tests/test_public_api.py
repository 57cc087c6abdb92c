"""The package's table of contents: what it lists is there, public at home, and documented."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fdpg_fast
from fdpg_fast import ops, reference

NAMES = [name for name in fdpg_fast.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_listed_name_is_public_at_home_and_documented(name: str) -> None:
    value = getattr(fdpg_fast, name)
    assert value.__doc__, f"fdpg_fast.{name} has no docstring"
    if name != "ops":
        home = sys.modules[f"fdpg_fast.{fdpg_fast._HOME[name]}"]
        assert name in home.__all__


def test_the_three_lists_of_init_agree() -> None:
    """What type checkers read, what `import *` reads, and what is imported when asked for."""
    tree = ast.parse(Path(fdpg_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: (node.module or "").removeprefix("fdpg_fast").lstrip(".") or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == fdpg_fast._HOME
    assert sorted(NAMES) == sorted(typed)


def test_every_op_has_a_definition_in_plain_pytorch() -> None:
    """The same name and the same arguments, so that one can stand in for the other."""
    functions = [
        n for n in ops.__all__ if inspect.isfunction(getattr(ops, n)) and n != "random_key"
    ]
    assert "token_logprob" in functions
    for name in functions:
        arguments = [inspect.signature(getattr(m, name)).parameters for m in (ops, reference)]
        assert list(arguments[0]) == list(arguments[1]), name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = fdpg_fast.Trainr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, fdpg_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_of_every_module_exists() -> None:
    for path in sorted(Path(fdpg_fast.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        defined = {
            name
            for node in ast.walk(tree)
            for name in (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                else [node.id]
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                else [alias.asname or alias.name for alias in node.names]
                if isinstance(node, ast.Import | ast.ImportFrom)
                else []
            )
        }
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                missing = set(ast.literal_eval(node.value)) - defined
                assert not missing, f"{path.name}: __all__ lists {sorted(missing)}"


def test_threads_are_told_to_spin_briefly_before_torch_asks() -> None:
    """Unless the user has said for how long."""
    code = "import os, sys, fdpg_fast; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    rest = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for given, expected in [({}, "10000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")]:
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=rest | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected

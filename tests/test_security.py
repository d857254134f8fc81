"""Nothing that is read is ever executed: no pickle, no eval, no shell."""

import ast
from pathlib import Path

import pytest

import lnr_adapters
import lnr_prune

CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FILES = [
    path for package in (lnr_prune, lnr_adapters) for path in sorted(Path(package.__path__[0]).rglob("*.py"))
]  # fmt: skip


def dangers(source: str) -> set[str]:
    """Names of what could execute what it reads."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} - {"pickle.UnpicklingError"}
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.add(node.func.id)
            elif isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                if owner == "os" and node.func.attr in CALLS:
                    found.add(f"os.{node.func.attr}")
                if owner == "torch" and node.func.attr == "load" and not _weights_only(node):
                    found.add("torch.load")
            found |= {"shell=True" for keyword in node.keywords if keyword.arg == "shell"}
    return found


def _weights_only(call: ast.Call) -> bool:
    return any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.name}" for path in FILES])
def test_nothing_read_is_executed(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", {"pickle"}),
        ("from pickle import loads, UnpicklingError", {"pickle.loads"}),
        ("eval('1')", {"eval"}),
        ("os.system('ls')", {"os.system"}),
        ("subprocess.run('ls', shell=True)", {"shell=True"}),
        ("torch.load(path)", {"torch.load"}),
        ("torch.load(path, weights_only=True)", set()),
        ("model.eval()", set()),
    ],
)
def test_what_is_looked_for_is_found(source: str, expected: set[str]) -> None:
    assert dangers(source) == expected

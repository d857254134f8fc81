"""The documentation is whole: `make docs` builds it and runs its tutorials."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

import lnr_prune
from lnr_prune.graph.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:class|function|data):: (\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(lnr_prune.__all__)


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert {page.stem for page in PAGES} - {"index"} <= set(index.split())


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_use_names_that_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree, clean=False)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lnr"
    }
    assert used <= set(lnr_prune.__all__)


def test_the_table_of_operations_is_that_of_the_rules() -> None:
    script = runpy.run_path(str(DOCS / "operations.py"))
    made, stored = script["page"](), (DOCS / "operations.md").read_text(encoding="utf-8")
    version = torch.__version__.split("+")[0]
    if f"of torch {version}," not in stored:  # the list of what has no rule is that of another version
        made, stored = (text.partition(script["REST"])[0] for text in (made, stored))
    assert made == stored, "write it again: python docs/operations.py"


def test_every_rule_says_what_it_does_to_channels() -> None:
    assert not [name for name, function in RULES.items() if not function.__doc__]


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", [pytest.param(code, id=page.stem) for page in PAGES for code in code_of(page)])
def test_code_on_pages_is_python_with_names_that_exist(code: str) -> None:
    compile(code, "page", "exec")
    assert set(re.findall(r"\blnr\.(\w+)", code)) <= set(lnr_prune.__all__)

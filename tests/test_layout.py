"""The plan of the house: imports go one way, between rooms and inside them, and nobody meets on a condition.

Every import counts: those for types, and those inside of functions.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "errors", "_version", "lasso", "runtime", "report", "graph", "calibration", "collapse", "refit", "selection",
    "", "testing", "recipes", "cli", "__main__",
)  # fmt: skip
"""In the order in which they may be imported: each sees those before it. "" is what lies in lnr_prune itself."""
SEEN_BY_ADAPTERS = {"errors", "graph", "calibration"}
COLLECTIVES = {"all_gather", "all_sum", "broadcast", "share_out", "before", "check_same"}
FILES, LINES = 12, 310  # of a room, of a file

Modules = Mapping[str, Path]
"""Dotted name -> file."""


def modules_in(*packages: Path) -> dict[str, Path]:
    """All modules of some packages; of those in ``adapters`` the folder is not a part of the name."""
    found = {}
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            parts = file.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(modules: Modules) -> Iterator[tuple[str, str, int]]:
    """Who imports whom, in which line."""
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                wanted = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
            else:
                continue
            yield from ((name, other, node.lineno) for other in wanted if other in modules)


def room_of(module: str) -> str:
    """The room that a module of lnr_prune lies in."""
    first = module.split(".")[1] if "." in module else ""
    return first if first in ROOMS else ""


def wrong_ways(modules: Modules) -> list[str]:
    """Imports of what comes later in the order of the rooms."""
    return [
        f"{name}:{line} imports {other}"
        for name, other, line in imports(modules)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]


def circle(modules: Modules) -> list[str]:
    """A circle of imports, [] if there is none."""
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for name, other, _ in imports(modules):
        arrows[name].add(other)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(arrows[name]) if (c := walk(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in modules if (found := walk(name, []))), [])


def meetings_on_a_condition(source: str) -> list[int]:
    """Lines of collective calls that are only made if something is true: a rank that does not come is waited for."""
    found: set[int] = set()

    def visit(node: ast.AST, conditional: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            conditional = False  # who calls it answers for it
        if conditional and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            holder = ast.unparse(node.func.value)
            if node.func.attr in COLLECTIVES and holder.rpartition(".")[2] in ("ranks", "_ranks"):
                found.add(node.lineno)
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                if isinstance(child, ast.AST):
                    branch = isinstance(node, ast.If | ast.IfExp) and name != "test"
                    second = isinstance(node, ast.BoolOp) and index > 0
                    visit(child, conditional or branch or second)

    visit(ast.parse(source), False)
    return sorted(found)


LIBRARY = modules_in(ROOT / "lnr_prune")
ADAPTERS = modules_in(ROOT / "adapters" / "lnr_adapters")
BENCHMARKS = modules_in(ROOT / "benchmarks")


def test_every_import_goes_to_an_earlier_room() -> None:
    assert wrong_ways(LIBRARY) == []


def test_there_is_no_circle() -> None:
    assert circle({**LIBRARY, **ADAPTERS, **BENCHMARKS}) == []


def test_the_library_does_not_know_its_adapters_and_these_see_two_rooms() -> None:
    everything = {**LIBRARY, **ADAPTERS}
    arrows = list(imports(everything))
    assert [(name, other) for name, other, _ in arrows if name in LIBRARY and other in ADAPTERS] == []
    seen = {room_of(other) for name, other, _ in arrows if name in ADAPTERS and other in LIBRARY}
    assert seen <= SEEN_BY_ADAPTERS


@pytest.mark.parametrize("name", LIBRARY)
def test_no_rank_decides_alone_whether_it_comes_to_a_meeting(name: str) -> None:
    assert meetings_on_a_condition(LIBRARY[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room", sorted({room_of(name) for name in LIBRARY} - {"", "errors", "_version", "__main__"}))
def test_a_room_is_small_and_says_what_it_is_for(room: str) -> None:
    folders = Counter(file.parent for name, file in LIBRARY.items() if room_of(name) == room)
    assert max(folders.values()) - 1 <= FILES, "without __init__.py"
    said = ast.get_docstring(ast.parse((ROOT / "lnr_prune" / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(said.split()) >= 40, "a paragraph: what the room does, what comes in and what goes out"


@pytest.mark.parametrize("name", LIBRARY)
def test_a_file_is_one_thought(name: str) -> None:
    assert len(LIBRARY[name].read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lnr_prune.lasso.prox", "from lnr_prune.refit.refit import refit\n"),
        ("lnr_prune.lasso.prox", "def late():\n    from lnr_prune.graph import groups\n"),
        ("lnr_prune.graph.nodes", "if TYPE_CHECKING:\n    from lnr_prune.calibration.calls import Call\n"),
        ("lnr_prune.lasso.prox", "from ..prune import prune\n"),
        ("lnr_prune.errors", "import lnr_prune.prune\n"),
    ],
)
def test_an_import_that_is_turned_round_is_found(name: str, line: str, tmp_path: Path) -> None:
    turned = tmp_path / LIBRARY[name].name
    turned.write_text(LIBRARY[name].read_text(encoding="utf-8") + line, encoding="utf-8")
    assert len(wrong_ways({**LIBRARY, name: turned})) == 1


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    turned = tmp_path / "prox.py"
    turned.write_text("from lnr_prune.lasso import solve\n", encoding="utf-8")
    assert circle({**LIBRARY, "lnr_prune.lasso.prox": turned})


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = ranks.all_gather(1)\n", []),
        ("if mine:\n    x = work.ranks.all_gather(1)\n", [2]),
        ("x = all(ranks.all_gather(1)) and mine\n", []),
        ("x = mine and all(ranks.all_gather(1))\n", [1]),
        ("x = self._ranks.all_sum(t) if mine else t\n", [1]),
        ("if any(ranks.all_gather(mine)):\n    pass\n", []),
    ],
)
def test_a_meeting_on_a_condition_is_found(source: str, lines: list[int]) -> None:
    assert meetings_on_a_condition(source) == lines

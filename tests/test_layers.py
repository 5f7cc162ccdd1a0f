"""Imports follow the order of rooms in docs/architecture.md, and there are no circular imports."""

import ast
import graphlib
import re
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "jaxmodels"


def written_order() -> dict[str, int]:
    """Room -> line, from the block under "## Layers" of docs/architecture.md."""
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Layers\n")[2].partition("\n## ")[0]
    lines = [line.split("  ")[0] for line in re.findall(r"(?m)^    (\S.*)$", section)]
    return {room.strip(): number for number, line in enumerate(lines) for room in line.split("|")}


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Return module -> modules of the package that it imports, also inside functions."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: a relative import"
                names |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = {name for name in names if name in modules}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def inside() -> dict[str, set[str]]:
    """Return `imports` without the package's `__init__` and `__main__`, the entry points for users."""
    return {module: names for module, names in imports().items() if module not in ("jaxmodels", "jaxmodels.__main__")}


def test_imports_follow_the_order():
    order = written_order()
    wrong = []
    for module, names in inside().items():
        for name in names - {"jaxmodels"}:
            here, there = room(module), room(name)
            if here != there and order[there] >= order[here]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, wrong


def test_every_room_is_in_the_list():
    rooms = {room(module) for module in inside()}
    assert rooms <= written_order().keys()
    assert len(rooms) <= 22


def test_no_circular_imports():
    graph = {module: names for module, names in imports().items() if module != "jaxmodels"}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_api_loads_nothing_of_plan():
    program = "import sys, jaxmodels.api; print([name for name in sys.modules if name.startswith('jaxmodels.plan')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"

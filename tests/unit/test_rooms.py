# SPDX-License-Identifier: Apache-2.0
"""What may import what: the table of rooms in docs/ARCHITECTURE.md, held to by the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import postcopyd

PACKAGE = Path(postcopyd.__file__).parent
TEXT = (Path(__file__).parents[2] / "docs/ARCHITECTURE.md").read_text()


def named(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"`([\w.]+)`", text))


def rooms() -> dict[str, frozenset[str]]:
    """What each room may import, itself and what everything may import included."""
    found = re.search(r"Everything may import (.*)\.\n", TEXT)
    assert found
    everything = named(found[1])
    rows = re.findall(
        r"^\| `([\w.]+)` \| .* \|(?: (.*))? \|$",
        TEXT.partition("## Rooms")[2].partition("\n## ")[0],
        re.M,
    )
    names = {name for name, _ in rows} | {"_native"}
    table = {}
    for name, may in rows:
        listed = names - named(may) if may.startswith("all but") else named(may)
        assert listed <= names, f"{name} may import what is no room: {listed - names}"
        table[name] = listed | everything | {name}
    return table


ROOMS = rooms()


def room(module: str) -> str:
    """`sessions.vm` is in `sessions`, `vmm.qemu.qmp` in `vmm.qemu`."""
    while module not in ROOMS and module != "_native":
        module, dot, _ = module.rpartition(".")
        assert dot, "a room that has no row"
    return module


def imports(path: Path) -> Iterator[str]:
    """Modules of the package, without its name: at the top, in functions, for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == "varlink":  # may be anybody's, under any name
                assert node.level <= 1
            else:
                assert not node.level, f"{path}: relative imports hide where things are"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("postcopyd.") for name in names if "postcopyd." in name)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__", "native.build"):
            found[name] = path
    return found


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_what_its_room_may(module: str) -> None:
    mine = room(module)
    for imported in imports(MODULES[module]):
        if imported == "__version__":
            continue
        assert room(imported) in ROOMS[mine], (
            f"{module} imports {imported}: {mine} may not, says docs/ARCHITECTURE.md"
        )


def test_every_room_is_there() -> None:
    """A row for what has gone would allow it to come back unseen."""
    assert {room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize(
    "name", [name for name in ROOMS if (PACKAGE / name.replace(".", "/")).is_dir()]
)
def test_a_room_says_what_it_owns(name: str) -> None:
    assert ast.get_docstring(
        ast.parse((PACKAGE / name.replace(".", "/") / "__init__.py").read_text())
    )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_has_two_things_in_it(module: str) -> None:
    """Past this length a file has, as it has been seen again and again."""
    lines = MODULES[module].read_text().count("\n")
    assert lines <= 500, f"{module} has {lines} lines: split it"


@pytest.mark.parametrize(
    ("module", "imported"),
    [("source", "control"), ("dest", "daemon"), ("protocol", "net"), ("vmm", "vmm.qemu")],
)
def test_the_core_opens_no_door(module: str, imported: str) -> None:
    """The table itself keeps to what it is for."""
    assert imported not in ROOMS[module]

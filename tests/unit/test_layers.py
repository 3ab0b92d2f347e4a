"""Imports point down only, pure code is pure, and nothing grows past what a reader can hold."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "kvmd"

# Module prefix -> layer; the longest match counts.
LAYERS = {
    "kvmd": 0,
    "kvmd.errors": 0,
    "kvmd.units": 0,
    "kvmd.paths": 0,
    "kvmd.unixpath": 0,
    "kvmd.launch": 0,
    "kvmd.standby": 0,
    "kvmd.config": 1,
    "kvmd.facts": 1,
    "kvmd.actions": 1,
    "kvmd.plan": 2,
    "kvmd.qemu": 2,
    "kvmd.importers": 2,
    "kvmd.guest.lifecycle": 2,
    "kvmd.tuning": 2,
    "kvmd.rpc.protocol": 2,
    "kvmd.rpc.auth": 2,
    "kvmd.rpc.registry": 2,
    "kvmd.rpc.results": 2,
    "kvmd.effects": 3,
    "kvmd.rpc": 4,
    "kvmd.guest": 4,
    "kvmd.tuning.agent": 4,
    "kvmd.wiring": 4,
    "kvmd.manager": 4,
    "kvmd.daemon": 5,
    "kvmd.start": 5,
    "kvmd.doctor": 5,
    "kvmd.cli": 6,
}
IMPURE = frozenset({"os", "subprocess", "socket", "asyncio", "time", "random", "pathlib", "shutil", "tempfile"})
EFFECTS_ONLY = frozenset({"pyroute2", "subprocess", "psutil", "qemu", "systemd"})
CLIENT_MAY = frozenset({"kvmd", "kvmd.errors", "kvmd.units", "kvmd.paths", "kvmd.unixpath", "kvmd.rpc.client"})
LONGEST_MODULE = 600
LONGEST_FUNCTION = 80


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def layer(module: str) -> int:
    best = max((prefix for prefix in LAYERS if module == prefix or module.startswith(prefix + ".")), key=len)
    return LAYERS[best]


def imports(tree: ast.AST, known: frozenset[str]) -> Iterator[str]:
    """Every module imported, `from kvmd.x import y` as kvmd.x.y where that is a module; not under TYPE_CHECKING."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module


MODULES = dict(modules())
KNOWN = frozenset(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    for name in imports(ast.parse(MODULES[module].read_text()), KNOWN):
        if name.split(".")[0] == "kvmd":
            assert layer(name) <= layer(module), f"{module} (L{layer(module)}) imports {name} (L{layer(name)})"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if layer(name) == 2))
def test_pure_modules_touch_nothing(module: str) -> None:
    found = {name.split(".")[0] for name in imports(ast.parse(MODULES[module].read_text()), KNOWN)}
    assert not found & IMPURE, f"{module} is pure and imports {sorted(found & IMPURE)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_world_is_touched_in_effects_only(module: str) -> None:
    if module.startswith("kvmd.effects"):
        return
    found = {name.split(".")[0] for name in imports(ast.parse(MODULES[module].read_text()), KNOWN)}
    assert not found & EFFECTS_ONLY, f"{module} imports {sorted(found & EFFECTS_ONLY)}"


def test_the_client_starts_on_the_standard_library() -> None:
    for module in ("kvmd.cli.main", "kvmd.cli.render", "kvmd.rpc.client"):
        if module not in MODULES:
            continue
        top = [node for node in ast.parse(MODULES[module].read_text()).body if isinstance(node, ast.stmt)]
        for name in imports(ast.Module(body=top, type_ignores=[]), KNOWN):
            if name.split(".")[0] == "kvmd" and not name.startswith("kvmd.cli"):
                assert name in CLIENT_MAY, f"{module} imports {name}"


def test_what_runs_apart_from_kvmd_needs_nothing_of_it() -> None:
    """The launcher becomes QEMU: it loads what is built into the interpreter. Its standby has the library."""
    launcher = ast.parse(MODULES["kvmd.launch"].read_text())
    at_start = [node for node in launcher.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name for node in at_start for name in imports(node, KNOWN)} == {"_socket", "os", "sys"}
    inside = {name: set(imports(node, KNOWN)) for node in launcher.body if (name := getattr(node, "name", ""))}
    assert {name for name, found in inside.items() if found} == {"stop"}  # which sheds nothing and becomes nothing
    standby = {name.split(".")[0] for name in imports(ast.parse(MODULES["kvmd.standby"].read_text()), KNOWN)}
    assert standby <= sys.stdlib_module_names


def test_nothing_is_too_long() -> None:
    for module, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= LONGEST_MODULE, f"{module} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{module}.{node.name} has {length} lines"

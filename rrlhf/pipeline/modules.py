"""The modules of a package as identity: what each is by its syntax tree, and which others it imports.

Nothing is imported and, while files are unchanged, nothing is parsed: what was found is remembered by file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import NamedTuple

from rrlhf.memo import Memory, mark_of
from rrlhf.sourcecode import imports, packages, parsed, tree_digest, without_docstrings

# Of this package: modules whose every effect on a result is already in the key (as settings), or that only show or
# store things.
WITHOUT_EFFECT = {
    "rrlhf.checks",
    "rrlhf.config",
    "rrlhf.environment",
    "rrlhf.files",
    "rrlhf.hardware",
    "rrlhf.memo",
    "rrlhf.sourcecode",
    "rrlhf.models.sources",
    "rrlhf.located",
    "rrlhf.locks",
    "rrlhf.progress",
    "rrlhf.stopping",
    "rrlhf.types",
}
SHOWN = 8  # hex digits of a definition's digest
REST = "*"  # what stands at the top of a module and defines no single name

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # syntax trees differ between versions


class Module(NamedTuple):
    """What a source file comes down to."""

    digest: str
    imports: list[str]  # every name in its import statements that may be a module
    definitions: str  # "name digest name digest ...", in order
    is_package: bool  # an __init__.py


class Modules:
    """The modules of one package. A file is read once: one process imports a module once, too."""

    def __init__(self, package: Path, memory: Path | None = None) -> None:
        self.package = package
        self._memory = Memory(memory) if memory else None
        self._read: dict[str, Module | None] = {}
        self._closures: dict[str, dict[str, str]] = {}

    def closure(self, module: str) -> dict[str, str]:
        """Return, per module that `module` imports at any depth (itself included), a digest of its syntax tree.

        Comments, docstrings and formatting are not part of a syntax tree, so editing them changes nothing. A module
        with nothing else in it is left out.
        """
        if module not in self._closures:
            self._closures[module] = self._closure(module)
        return {**self._closures[module]}

    def _closure(self, module: str) -> dict[str, str]:
        found: dict[str, str] = {}
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            name = waiting.pop()
            if name in seen or name in WITHOUT_EFFECT:
                continue
            seen.add(name)
            read = self._module(name)
            if read is None:
                continue
            if read.definitions:
                found[f"{name}.__init__" if read.is_package else name] = read.digest
            waiting += [each for each in (*read.imports, *packages(name)) if each.split(".")[0] == self.package.name]
        if self._memory:
            self._memory.save()
        return dict(sorted(found.items()))

    def definitions(self, modules: Mapping[str, str]) -> dict[str, str]:
        """Return the digests of the definitions in modules, given as `closure` returns them."""
        known = {name: self._module(name.removesuffix(".__init__")) for name in modules}
        return {name: read.definitions for name, read in known.items() if read and read.digest == modules[name]}

    def exists(self, module: str) -> bool:
        """Whether the package has a module of this name."""
        return self._module(module) is not None

    def _module(self, name: str) -> Module | None:
        if name not in self._read:
            base = self.package.joinpath(*name.split(".")[1:])
            files = (base / "__init__.py", base.with_suffix(".py")) if base != self.package else (base / "__init__.py",)
            path = next((path for path in files if path.is_file()), None)
            self._read[name] = self._remembered(path, name) if path else None
        return self._read[name]

    def _remembered(self, path: Path, name: str) -> Module:
        mark = [*(mark_of(path) or []), PYTHON] if self._memory else []
        known = self._memory.known.get(str(path)) if self._memory else None
        if known and len(mark) > 1 and known[0] == mark:
            return Module(*known[1:])
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        module = read_module(path, package)
        if self._memory and len(mark) > 1:
            self._memory.known[str(path)] = [mark, *module]
            self._memory.grew = True
        return module


def read_module(path: Path, package: str) -> Module:
    """Parse a source file; `package`: where its relative imports start. Raises ParamsError for no valid Python."""
    tree = without_docstrings(parsed(path))
    digests = [f"{name} {digest}" for name, digest in _definitions(tree).items()]
    return Module(tree_digest(tree), sorted(set(imports(tree, package))), " ".join(digests), path.name == "__init__.py")


def changed_definitions(old: str, new: str) -> str:
    """Say which definitions differ between two texts of `Module.definitions`."""
    before, after = _by_name(old), _by_name(new)
    both = [name for name in after if name in before and before[name] != after[name]]
    told = {
        "changed": ["its other lines" if name == REST else name for name in both],
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }
    return ", ".join(f"{_listed(names)} {verb}" for verb, names in told.items() if names) or "order changed"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _by_name(definitions: str) -> dict[str, str]:
    words = definitions.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Return a digest per function, method, class and named value of a module, and one for all other lines."""
    parts: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name, part in _named(statement):
            parts.setdefault(name, []).append(part)
    return {
        name: tree_digest(ast.Module(body=[*statements], type_ignores=[]))[:SHOWN] for name, statements in parts.items()
    }


def _named(statement: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the definitions that a statement holds, by name; a class's methods by themselves."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name, statement
    elif isinstance(statement, ast.ClassDef):
        methods = [part for part in statement.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
        rest = [part for part in statement.body if part not in methods]
        head = copy(statement)
        head.body = rest
        yield statement.name, head
        yield from ((f"{statement.name}.{method.name}", method) for method in methods)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield names[0] if len(names) == 1 == len(targets) else REST, statement
    else:
        yield REST, statement

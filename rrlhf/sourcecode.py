"""Source code as identity: digests of syntax trees, and what stands behind a module's name, found without importing."""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer, iter_modules
from typing import NamedTuple

from rrlhf.canonical import canonical, imports
from rrlhf.located import ParamsError, did_you_mean

OURS = "rrlhf"


class Code(NamedTuple):
    """What a module of the user comes down to."""

    sources: dict[str, str]  # digest of every source file, by module: itself and what it imports of the user's own
    versions: dict[str, str]  # of the installed distributions that they import
    ours: tuple[str, ...]  # the modules of this package that they import


@cache
def code_behind(module: str, root: Path) -> Code:
    """Follow a module's import statements, at any depth, through all files that no installer brought.

    Cached: one process imports a module once, and should name the same code ever after. Raises ParamsError when there
    is no such module, and for a file that is no Python.
    """
    if spec_of(module, root) is None:
        raise ParamsError(not_found(module, root))
    sources: dict[str, str] = {}
    versions: dict[str, str] = {}
    ours: set[str] = set()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        path = source_file(name, root) if name not in seen and top not in sys.stdlib_module_names else None
        seen.add(name)
        if path is None:
            continue
        if top == OURS:
            ours.add(name)
            continue
        if name == module or not _is_installed(path):
            sources[_shown(name, path)] = file_digest(path)
        if _is_installed(path):
            versions |= _versions(top)
        elif path.suffix == ".py":
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            found = [each for node in ast.walk(parsed(path)) for _, _, each in imports(node, package)]
            waiting += [above for each in (name, *found) for above in (each, *packages(each))]
    return Code(dict(sorted(sources.items())), versions, tuple(sorted(ours)))


def changed_since(sources: Mapping[str, str], root: Path) -> list[str]:
    """Return the modules of an earlier `Code.sources` whose files have another digest by now."""
    files = {name: source_file(name.removesuffix(".__init__"), root) for name in sources}
    return [name for name, path in files.items() if path is None or file_digest(path) != sources[name]]


def source_file(module: str, root: Path) -> Path | None:
    """Return the file of a module, None where it has none or there is no such module."""
    spec = spec_of(module, root)
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def spec_of(module: str, root: Path) -> ModuleSpec | None:
    """Find a module as an import with `root` on the path would, but import nothing, its packages neither."""
    importable(root)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    name, *rest = module.split(".")
    spec = None if name == "__main__" else find_spec(name)
    for part in rest:
        name = f"{name}.{part}"
        spec = _inside(spec, name) if spec else None
    return spec


def not_found(module: str, root: Path) -> str:
    """Say that there is no such module, where it was looked for, and which one may be meant."""
    above, _, last = module.rpartition(".")
    package = spec_of(above, root) if above else None
    if above and package is None:
        return not_found(above, root)
    folders = (package.submodule_search_locations or [f"{above}, which is no package"]) if package else [str(root)]
    known = sorted({found.name for found in iter_modules(folders)})
    where = ", ".join(folders) if package else f"{root} or among what is installed"
    return f"no module {module} in {where}{did_you_mean(last, known) if known else ''}"


def importable(root: Path) -> None:
    """Let modules in the project's folder be imported, in every process and however this one was started."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def file_digest(path: Path) -> str:
    """Return a digest of what a source file says, or of the bytes of any other file."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    texts = [canonical(statement, {}, "")[0] for statement in parsed(path).body]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree. Raises ParamsError, with file and line, when it is no valid Python."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ParamsError(f"{path}:{getattr(error, 'lineno', None) or 1}: not valid Python: {error}") from None


def _inside(package: ModuleSpec, name: str) -> ModuleSpec | None:
    """Find a module in the folders of its package; a folder without __init__.py is a package too, after all else."""
    bare = None
    for folder in package.submodule_search_locations or ():
        finder = get_importer(folder)
        spec = finder.find_spec(name) if finder else None
        if spec and spec.loader:
            return spec
        bare = bare or spec
    return bare


def _is_installed(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _versions(top: str) -> dict[str, str]:
    """Return the version of the distribution that brought a top-level module."""
    try:
        return {top: version(top)}
    except PackageNotFoundError:  # its name is another, as PyYAML's: a search through all that is installed
        return {name: version(name) for name in packages_distributions().get(top, [])}


def packages(name: str) -> Iterator[str]:
    """Yield the packages that a module lies in: to import it, Python runs the __init__.py of each."""
    while name := name.rpartition(".")[0]:
        yield name


def _shown(name: str, path: Path) -> str:
    return f"{name}.__init__" if path.name == "__init__.py" else name

"""Source code as identity: statements without what cannot change a number, and what stands behind a module's name.

Nothing is imported for it.
"""

import ast
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import all_suffixes
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

from rrlhf.located import ParamsError, did_you_mean

OURS = "rrlhf"
TELLING = ("logging.info.", "logging.warning.", "print.", "rrlhf.progress.", "warnings.warn.")  # only tell something

SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # names in them are their own

Names = Mapping[str, set[str]]  # what stands behind a name of a module, dotted: more than one thing where that depends


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
    if source_file(module, root) is None:
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
            sources[f"{name}.__init__" if path.name == "__init__.py" else name] = file_digest(path)
        if _is_installed(path):
            versions |= _versions(top)
        elif path.suffix == ".py":
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            found = [each for node in ast.walk(parsed(path)) for _, _, each in imports(node, package)]
            parts = [each.split(".") for each in (name, *found)]  # of packages, Python runs the __init__.py of each
            waiting += [".".join(each[:length]) for each in parts for length in range(1, len(each) + 1)]
    return Code(dict(sorted(sources.items())), versions, tuple(sorted(ours)))


def changed_since(sources: Mapping[str, str], root: Path) -> list[str]:
    """Return the modules of an earlier `Code.sources` whose files have another digest by now."""
    files = {name: source_file(name.removesuffix(".__init__"), root) for name in sources}
    return [name for name, path in files.items() if path is None or file_digest(path) != sources[name]]


def source_file(module: str, root: Path) -> Path | None:
    """Return the file of a module, as an import with `root` on the path would find it; None where there is none."""
    importable(root)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    top, *parts = module.split(".")
    spec = None if top == "__main__" else find_spec(top)
    if spec is None or not parts:
        return Path(spec.origin) if spec and spec.origin and spec.has_location else None
    bases = [Path(folder, *parts) for folder in spec.submodule_search_locations or ()]
    files = [Path(f"{base}{each}") for base in bases for each in ("/__init__.py", *all_suffixes())]
    return next((file for file in files if file.is_file()), None)


def not_found(module: str, root: Path) -> str:
    """Say that there is no such module, where it was looked for, and which one may be meant."""
    above, _, last = module.rpartition(".")
    package, folder = source_file(above, root) if above else None, root.joinpath(*above.split("."))
    if package and package.name != "__init__.py":
        return f"no module {module} in {above}, which is no package"
    if not (package or folder.is_dir()):
        return not_found(above, root)
    known = sorted({found.name for found in iter_modules([str(package.parent if package else folder)])})
    where = f"{package.parent if package else folder}{'' if above else ' or among what is installed'}"
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


def _is_installed(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))


def _versions(top: str) -> dict[str, str]:
    """Return the version of the distribution that brought a top-level module."""
    try:
        return {top: version(top)}
    except PackageNotFoundError:  # its name is another, as PyYAML's: a search through all that is installed
        return {name: version(name) for name in packages_distributions().get(top, [])}


def canonical(statement: ast.stmt, names: Names, top: str) -> tuple[str, list[str]]:
    """Return a statement, which is changed, as a text of what it does, and what its names stand for, in their order.

    names: what stands behind each name of the module. top: package whose names are taken out of the text, so that they
    count by what they stand for alone.
    """
    canon = _Canon(names, top)
    kept = canon.visit(statement)
    return _dump(kept) if kept else "", canon.uses


def _dump(node: Any) -> str:
    """Return a syntax tree as text: that of `ast.dump` differs between versions of Python."""
    match node:
        case ast.AST():
            fields = (
                f"{name}={_dump(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []
            )
            return f"{type(node).__name__}({', '.join(fields)})"
        case list():
            return f"[{', '.join(map(_dump, node))}]"
    return ascii(node)


class _Canon(ast.NodeTransformer):
    """Takes out of a syntax tree what cannot change a number, and notes what its names stand for.

    Out come docstrings, annotations that nothing reads, the words of messages, and where in the package something lies.
    Two trees that come out the same do the same.
    """

    def __init__(self, names: Names, top: str) -> None:
        self._names, self._top = names, top
        self._fields: set[ast.stmt] = set()
        self.uses: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        if not node.decorator_list:  # what decorates may read them, as pydantic does
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._fields |= {*node.body}
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node in self._fields:  # what a class has, in this order
            return self.generic_visit(node)
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> ast.AST | None:
        """Keep what is imported of others; what is the package's own counts where it is used."""
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        is_ours = getattr(node, "level", 0) or all(map(self._is_ours, modules))
        return None if self._top and is_ours else node

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            _take_words_out(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name, *parts = _chain(node.func) or [""]
        if all(".".join([target, *parts, ""]).startswith(TELLING) for target in self._names.get(name, {name})):
            _take_words_out(node)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name | ast.Attribute) -> ast.AST:
        """Note what a name stands for, and take it out if that is certain and the package's own."""
        chain = _chain(node)
        if chain is None:
            return self.generic_visit(node)
        name, *parts = chain
        targets = sorted(self._names.get(name, ()))
        self.uses += [".".join([target, *parts]) for target in targets]
        return ast.Name(id="@", ctx=node.ctx) if len(targets) == 1 and self._is_ours(targets[0]) else node

    visit_Attribute = visit_Name  # noqa: N815

    def _is_ours(self, dotted: str) -> bool:
        return bool(self._top) and dotted.partition(".")[0] == self._top


def _chain(node: ast.expr) -> list[str] | None:
    """Return the parts of a dotted name; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else None


def _take_words_out(call: ast.Call) -> None:
    """Take the words out of a call's arguments, in place; what is called to find them stays."""
    call.args = [_wordless(argument) for argument in call.args]
    for keyword in call.keywords:
        keyword.value = _wordless(keyword.value)


def _wordless(node: ast.expr) -> ast.expr:
    match node:
        case ast.Constant(value=str()):
            return ast.Constant(value="")
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod()):
            return ast.BinOp(left=_wordless(left), op=node.op, right=_wordless(node.right))
        case ast.JoinedStr():
            does = ast.Call | ast.Await | ast.NamedExpr | ast.Yield | ast.YieldFrom
            inside = [each.value for each in node.values if isinstance(each, ast.FormattedValue)]
            doing = [each for each in inside if any(isinstance(below, does) for below in ast.walk(each))]
            return ast.Tuple(elts=doing, ctx=ast.Load())
    return node


def names_bound(statement: ast.AST) -> set[str]:
    """Return the names that a statement at the top of a module binds, less those of imports."""
    found, waiting = set[str](), [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def imports(node: ast.AST, package: str) -> Iterator[tuple[str, str, str]]:
    """Yield every name that an import statement binds, if it is one; what it stands for; and what may be a module.

    package: where relative ones start.
    """
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, alias.name if alias.asname else top, alias.name
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")
        start = filter(None, above[: len(above) - node.level + 1]) if node.level else ()
        base = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            yield alias.asname or alias.name, f"{base}.{alias.name}", f"{base}.{alias.name}"

"""Code without what cannot change a number: a statement as a text of what it does, and what its names stand for."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Sequence

TELLING = ("logging.info.", "logging.warning.", "print.", "rrlhf.progress.", "warnings.warn.")  # only tell something

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Names = dict[str, set[str]]  # what stands behind a name of a module, dotted: more than one thing where that depends


def canonical(nodes: Sequence[ast.AST], names: Names, top: str) -> tuple[str, list[str]]:
    """Return a statement as a text of what it does, and what the names in it stand for, in their order.

    nodes: the statement, which is changed, and all below it. names: what stands behind each name of the module. top:
    package whose names are taken out of the text, so that they count by what they stand for alone.
    """
    canon = _Canon(nodes, names, top)
    kept = canon.visit(nodes[0])
    for part in kept.body if isinstance(kept, ast.ClassDef) else [kept]:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            _number_locals(part, set(names))
    return ast.dump(kept) if kept else "", canon.uses


class _Canon(ast.NodeTransformer):
    """Takes out of a syntax tree what cannot change a number, and notes what its names stand for.

    Out come docstrings, annotations that nothing reads, the words of messages, the names of local variables, and where
    in the package something lies. Two trees that come out the same do the same.
    """

    def __init__(self, nodes: Sequence[ast.AST], names: Names, top: str) -> None:
        self._names, self._top = names, top
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        declared = (_declared(node) for node in nodes if not isinstance(node, ast.alias | ast.keyword))
        self._local = stored.union(*declared) - names_bound(nodes[0])
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
            self._without_words(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name, *parts = _chain(node.func) or [""]
        targets = () if name in self._local else self._names.get(name, {name})
        if targets and all(".".join([target, *parts, ""]).startswith(TELLING) for target in targets):
            self._without_words(node, names_too=True)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name | ast.Attribute) -> ast.AST:
        """Note what a name stands for, and take it out if that is certain and the package's own."""
        chain = _chain(node)
        if chain is None:
            return self.generic_visit(node)
        name, *parts = chain
        targets = sorted(self._names.get(name, ()))
        self.uses += [".".join([target, *parts]) for target in targets]
        if len(targets) == 1 and name not in self._local and self._is_ours(targets[0]):
            return ast.Name(id="@", ctx=node.ctx)
        return node

    visit_Attribute = visit_Name  # noqa: N815

    def _is_ours(self, dotted: str) -> bool:
        return bool(self._top) and dotted.partition(".")[0] == self._top

    def _without_words(self, call: ast.Call, *, names_too: bool = False) -> None:
        """Take the words out of a call's arguments, in place; what is called to find them stays.

        names_too: also text without a space, which else may be a name that something goes by.
        """
        call.args = [_wordless(argument, names_too) for argument in call.args]
        for keyword in call.keywords:
            keyword.value = _wordless(keyword.value, names_too)


def _chain(node: ast.expr) -> list[str] | None:
    """Return the parts of a dotted name; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else None


def _wordless(node: ast.expr, names_too: bool) -> ast.expr:
    match node:
        case ast.Constant(value=str(text)) if names_too or " " in text:
            return ast.Constant(value="")
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod()):
            return ast.BinOp(left=_wordless(left, names_too), op=node.op, right=_wordless(node.right, names_too))
        case ast.JoinedStr(values=values) if names_too or any(
            " " in getattr(each, "value", "") for each in values if isinstance(each, ast.Constant)
        ):
            inside = [value.value for value in values if isinstance(value, ast.FormattedValue)]
            return ast.Tuple(elts=[each for each in inside if _does_something(each)], ctx=ast.Load())
    return node


def _does_something(expression: ast.expr) -> bool:
    does = ast.Call | ast.Await | ast.NamedExpr | ast.Yield | ast.YieldFrom
    return any(isinstance(node, does) for node in ast.walk(expression))


def _number_locals(function: ast.FunctionDef | ast.AsyncFunctionDef, taken: set[str]) -> None:
    """Number the local variables of a function, in place; names that anything else may go by stay as they are.

    A name becomes the same number everywhere in the function, and no two the same, so that what refers to what stays.
    """
    nodes = [*ast.walk(function)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    if used & {"locals", "vars", "dir", "eval", "exec"} or any(isinstance(node, ast.ClassDef) for node in nodes):
        return
    stored = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    others = taken.union(dir(builtins), {"@"}, *map(_declared, nodes))
    numbers = {name: str(number) for number, name in enumerate(name for name in stored if name not in others)}
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = numbers.get(node.id, node.id)


def names_bound(statement: ast.AST) -> set[str]:
    """Return the names that a statement at the top of a module binds, less those of imports."""
    nodes = [*walk([statement], SCOPES)]
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def walk(nodes: Iterable[ast.AST], closed: tuple[type[ast.AST], ...]) -> Iterator[ast.AST]:
    """Yield nodes and all below them, but of what is `closed` only itself, its decorators and its defaults."""
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, closed):
            waiting += getattr(node, "decorator_list", [])
            waiting += [
                each for each in ast.iter_child_nodes(getattr(node, "args", ast.Pass())) if isinstance(each, ast.expr)
            ]
        else:
            waiting += ast.iter_child_nodes(node)


def _declared(node: ast.AST) -> set[str]:
    """Return the names that a node binds or declares other than by assignment."""
    if isinstance(node, ast.expr | ast.expr_context):
        return set()
    words = [getattr(node, field, None) for field in ("name", "asname", "arg", "rest")]
    words += node.names if isinstance(node, ast.Global | ast.Nonlocal) else []
    return {word for word in words if isinstance(word, str)}


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Yield what may be a module in an import statement, if it is one; `package`: where relative ones start."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (base := _base(node, package)):
        yield from (base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*"))


def names_of_imports(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """Yield every name that an import statement binds, if it is one, with what it stands for, dotted."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"{_base(node, package)}.{alias.name}"


def _base(node: ast.ImportFrom, package: str) -> str:
    above = package.split(".")
    start = filter(None, above[: len(above) - node.level + 1]) if node.level else ()
    return ".".join([*start, *([node.module] if node.module else [])])

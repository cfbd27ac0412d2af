"""Code without what cannot change a number: a statement as a text of what it does, and what its names stand for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

TELLING = ("logging.info.", "logging.warning.", "print.", "rrlhf.progress.", "warnings.warn.")  # only tell something

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Names = Mapping[str, set[str]]  # what stands behind a name of a module, dotted: more than one thing where that depends


def canonical(statement: ast.stmt, names: Names, top: str) -> tuple[str, list[str]]:
    """Return a statement, which is changed, as a text of what it does, and what its names stand for, in their order.

    names: what stands behind each name of the module. top: package whose names are taken out of the text, so that they
    count by what they stand for alone.
    """
    canon = _Canon(names, top)
    kept = canon.visit(statement)
    return ast.dump(kept) if kept else "", canon.uses


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

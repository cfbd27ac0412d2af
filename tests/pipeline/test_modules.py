"""Code as identity: what can change a number counts, where it lies and what it tells people does not."""

import ast
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.pipeline.modules import WHOLE, Modules, changed_definitions

ROOT = "shop.stages.sell.run"
SHOP = {
    "__init__.py": '"""A shop."""\n',
    "stages/__init__.py": "",
    "stages/sell.py": '''
"""Selling."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shop import units
from shop.maths import RATES, rate as taxed
from shop.parts.wheel import Wheel, check

if TYPE_CHECKING:
    from shop.unused import Customer

def run(goods: list[float], customer: Customer | None = None, discount: float = 0.25) -> float:
    """Sell."""
    from shop.parts import bell

    total, wheel = 0.0, Wheel(3)
    for good in goods:
        check(good)
        rounded = units.whole(good) * bell.SIZE
        total += taxed(rounded, "food") if good > 1 else wheel.price(rounded)
    print(f"sold {len(goods)} for {total}", flush=True)
    return math.floor(total * (1 - discount)) + sum(RATES.values())
''',
    "maths.py": '''
"""Numbers."""
RATES = {"food": 7, "rest": 19}

def rate(price: float, kind: str) -> float:
    """With the tax."""
    found = price * (100 + RATES[kind]) / 100
    if found < 0:
        raise ValueError(f"a price of {found} is below nothing: raise it")
    return found
''',
    "units.py": "def whole(number):\n    return _half(number) * 2\n\ndef _half(number):\n    return number / 2\n",
    "parts/__init__.py": "",
    "parts/wheel.py": '''
class Wheel:
    """Round."""
    sides: int = 4

    def __init__(self, width: int) -> None:
        self.width = width

    def price(self, base: float) -> float:
        scaled = base * self.width
        return scaled - self.sides

def check(number):
    assert number == number, "no number is this"
''',
    "parts/bell.py": "SIZE = 2\nUNUSED = 3\n",
    "unused.py": "class Customer:\n    pass\n",
}


def closure(folder, files):
    """Write a package and return what its stage is made of."""
    package = folder / "shop"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in files:
            path.unlink()
    return Modules(package).closure(ROOT)


def replaced(old, new, *names):
    def edit(files):
        return {name: text.replace(old, new) if not names or name in names else text for name, text in files.items()}

    return edit


def with_other_module_name(files):
    files = replaced("shop.maths", "shop.arithmetic")(files)
    return {name.replace("maths.py", "arithmetic.py"): text for name, text in files.items()}


def with_function_moved(files):
    """Move `check` from where the wheel is to a module of its own."""
    text = files["parts/wheel.py"]
    if "def check" not in text:
        return files
    start = text.index("def check")
    there = {"parts/wheel.py": text[:start], "parts/checks.py": text[start:]}
    return replaced("Wheel, check", "Wheel\nfrom shop.parts.checks import check")(files) | there


def reformatted(files):
    return {name: ast.unparse(ast.parse(text)) for name, text in files.items()}


PRESERVING = [
    with_other_module_name,
    with_function_moved,
    reformatted,
    replaced("is below nothing: raise it", "is too low"),
    replaced("sold {len(goods)} for", "for {len(goods)} I got"),
    replaced('"no number is this"', 'f"{number} is no number"'),
    replaced('"""With the tax."""', '"""Add the tax."""'),
    replaced("base: float", "base: int"),
    replaced("-> float", "-> object"),
    replaced("UNUSED = 3", "UNUSED = 4"),
    replaced("from shop.parts import bell", "import shop.parts.bell as bell"),
    replaced("Customer:\n    pass", "Customer:\n    name = 1"),
]


@settings(max_examples=60, deadline=None)
@given(edits=st.lists(st.sampled_from(PRESERVING), min_size=1, max_size=6))
def test_what_changes_no_number_changes_no_key(tmp_path_factory, edits):
    folder, files = tmp_path_factory.mktemp("shop"), SHOP
    for edit in edits:
        files = edit(files)
    assert closure(folder, files) == closure(folder, SHOP)


def test_every_python_gives_the_same_digests(tmp_path):
    """These are Python 3.11's, and 3.12's and 3.13's: who installs another one computes nothing again."""
    assert closure(tmp_path, SHOP) == {
        "RATES": "eb257057",
        "SIZE": "452028a8",
        "Wheel": "e7d5008d",
        "_half": "0e1cfe9d",
        "check": "3ead9fbe",
        "rate": "0a9256e1",
        "run": "f748d47b",
        "whole": "7f26af2f",
        WHOLE: "ed093ab67c0654fe1b0dca1ecf26a940",
    }


def mutations(tree):
    """Yield copies of a syntax tree that each do something else."""
    telling = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Assert | ast.Expr | ast.JoinedStr)]
    told = {id(below) for node in telling for below in ast.walk(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in told:
            continue
        other = deepcopy(tree)
        copy = [*ast.walk(other)][number]
        match copy:
            case ast.Constant(value=bool() | None) | ast.BinOp(op=ast.BitOr()):  # the latter are annotations
                continue
            case ast.Constant(value=int() | float()):
                copy.value += 1
            case ast.Constant(value=str()):
                copy.value += "s"
            case ast.BinOp(op=ast.Mult()):
                copy.op = ast.Add()
            case ast.BinOp():
                copy.op = ast.Mult()
            case ast.Compare():
                copy.ops = [ast.GtE()]
            case ast.Call(func=ast.Name(id=name)):
                copy.func.id = "min" if name != "min" else "max"
            case ast.Attribute(ctx=ast.Load()):
                copy.attr += "s"
            case ast.FunctionDef() if len(copy.body) > 1 and ast.dump(copy.body[-1]) != ast.dump(copy.body[-2]):
                copy.body[-2:] = copy.body[-1], copy.body[-2]
            case _:
                continue
        yield ast.unparse(other)


CHANGED = [
    (name, text)
    for name in ("stages/sell.py", "maths.py", "units.py", "parts/wheel.py")
    for text in mutations(ast.parse(SHOP[name]))
]


@settings(max_examples=100, deadline=None)
@given(changed=st.sampled_from(CHANGED))
def test_what_may_change_a_number_changes_the_key(tmp_path_factory, changed):
    folder, name, text = tmp_path_factory.mktemp("shop"), *changed
    assert closure(folder, SHOP | {name: text})[WHOLE] != closure(folder, SHOP)[WHOLE]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("/ 100", "/ 99", "rate changed"),
        ('"rest": 19', '"rest": 20', "RATES changed"),
        ("SIZE = 2", "SIZE = 3", "SIZE changed"),
        ("self.sides", "self.width", "Wheel changed"),
        ("_half", "_part", "_part, whole, _half changed"),
        ("def whole", "@cache\ndef whole", "whole changed"),
        ("SIZE = 2", "SIZE = 2\nprint(SIZE)", "(other lines) changed"),
        ("a price", "the price", ""),
    ],
)
def test_what_changed_is_told_by_its_name(tmp_path, old, new, words):
    before, after = closure(tmp_path, SHOP), closure(tmp_path, replaced(old, new)(SHOP))
    assert (changed_definitions(before, after) if before != after else "") == words


def test_two_functions_of_one_name_are_not_taken_for_each_other(tmp_path):
    """Swapped, each module has what the other had: the same definitions, put together otherwise."""
    one, two = "def f(): return _g()\ndef _g(): return 1\n", "def f(): return _g()\ndef _g(): return 2\n"
    uses = "from shop import a, b\ndef run(): return a.f() - b.f()\n"
    before = closure(tmp_path, {"a.py": one, "b.py": two, "stages/sell.py": uses})
    after = closure(tmp_path, {"a.py": two, "b.py": one, "stages/sell.py": uses})
    assert changed_definitions(before, after) == "put together otherwise"


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("from shop import again\ndef run(): return again.entry()\n", {"run", "(other lines)", "TABLE", "entry"}),
        ("from shop import plain\ndef run(name): return getattr(plain, name)\n", {"run", "first", "second"}),
        ("from shop.plain import first\ndef run(first=first): return first\n", {"run", "first"}),
        ("try:\n    from shop.plain import first\nexcept ImportError:\n    def first(): ...\ndef run(): first()\n",
         {"run", "first", "(other lines)"}),
        ("x = y = 1\nif x:\n    y = 2\ndef run(): return y\n", {"run", "x", "y", "(other lines)"}),
        ("def run():\n    global state\n    state = 1\nstate = 0\n", {"run", "state"}),
        ("def run(): return later()\ndef later(): return run()\n", {"run", "later"}),
    ],
)  # fmt: skip
def test_whatever_code_may_meet_is_reached(tmp_path, text, reached):
    files = {
        "effects/__init__.py": "TABLE = {}\ndef entry(): ...\nTABLE['entry'] = entry\n",
        "again.py": "from .effects import entry\n",
        "plain.py": "def first(): ...\ndef second(): ...\n",
    }
    assert closure(tmp_path, files | {"stages/sell.py": text}).keys() - {WHOLE} == reached

"""Code as identity, down to the definition that changed."""

import pytest

from rrlhf.pipeline.modules import Modules, changed_definitions, read_module

SOURCE = '''
"""A module."""
import math

LIMIT = 3
first, second = 1, 2

def size(x):
    """How large it is."""
    return math.sqrt(x)

class Shape:
    sides: int = 4

    def area(self):
        return self.sides ** 2

if LIMIT > 2:
    LIMIT += 1
'''


@pytest.fixture
def told(tmp_path):
    """Say what a change of the source comes down to."""

    def change(old, new):
        assert old in SOURCE
        texts = []
        for text in (SOURCE, SOURCE.replace(old, new)):
            (tmp_path / "module.py").write_text(text)
            texts.append(read_module(tmp_path / "module.py", "package"))
        return changed_definitions(texts[0].definitions, texts[1].definitions) if texts[0] != texts[1] else None

    return change


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("math.sqrt(x)", "x", "size changed"),
        ("** 2", "** 3", "Shape.area changed"),
        ("int = 4", "int = 5", "Shape changed"),
        ("LIMIT = 3", "LIMIT = 4", "LIMIT changed"),
        ("second = 1, 2", "second = 2, 2", "its other lines changed"),
        ("import math", "import math, json", "its other lines changed"),
        ("def size(x)", "def volume(x)", "volume added, size removed"),
        ("def size(x)", "@cache\ndef size(x)", "size changed"),
        ("How large", "Tell how large", None),
        ("LIMIT = 3", "LIMIT = 3  # at most", None),
    ],
)
def test_the_changed_definition_is_named(told, old, new, words):
    assert told(old, new) == words


def test_another_order_is_a_change(told):
    assert told("LIMIT = 3\nfirst, second = 1, 2", "first, second = 1, 2\nLIMIT = 3") == "order changed"


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "shop"
    (folder / "parts").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A shop."""')
    (folder / "front.py").write_text("def open():\n    from .parts import wheel\n    import shop.back\n")
    (folder / "back.py").write_text("from shop import front, absent\nimport json\n")
    (folder / "parts" / "__init__.py").write_text("SIZE = 1\n")
    (folder / "parts" / "wheel.py").write_text("from . import SIZE\n")
    (folder / "parts" / "bell.py").write_text("RING = 1\n")
    return folder


def test_imports_are_followed_wherever_they_stand_and_packages_count(package):
    found = Modules(package).closure("shop.front")
    assert set(found) == {"shop.front", "shop.back", "shop.parts.__init__", "shop.parts.wheel"}


def test_memory_of_code_gives_what_reading_gives(package, tmp_path):
    memory = tmp_path / "code.json"
    for text in ("SIZE = 1\n", "SIZE = 2\n", "SIZE = 2\n", "SIZE = 1  # again\n"):
        (package / "parts" / "__init__.py").write_text(text)
        for _ in range(2):
            assert Modules(package, memory).closure("shop.front") == Modules(package).closure("shop.front")
    assert memory.exists()

"""Pages for people: templates of this package, in which what others wrote is escaped and made visible."""

from __future__ import annotations

import unicodedata

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(template: str, **content: object) -> str:
    """Fill a template of this package; what others wrote is escaped and made visible."""
    environment = Environment(
        loader=PackageLoader("rrlhf"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(**content)


def visible(text: str) -> str:
    """Show control and other unseen characters as ⟨U+001B⟩, so that no text acts on a terminal or hides in a page."""
    return "".join(character if character in "\n\t" else _seen(character) for character in text)


def _seen(character: str) -> str:
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return f"⟨U+{ord(character):04X}⟩" if hidden else character

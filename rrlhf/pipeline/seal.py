"""A JSON document that tells when any of its bytes was changed: its last field is the sha256 of all the rest.

A seal finds accidents and careless edits. It is no signature: who rewrites a document can seal it again, and is then
found by the registry, whose tags hold the digest of the content.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEAL = "seal"


def sealed(document: dict[str, Any]) -> str:
    """Return the one text of a document, with its seal."""
    text = json.dumps(document, indent=1)
    return json.dumps(document | {SEAL: hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def opened(text: bytes) -> dict[str, Any]:
    """Return the document of a sealed text. Raises ValueError when a byte is not as `sealed` wrote it."""
    document = json.loads(text)
    if not isinstance(document, dict) or document.pop(SEAL, None) is None:
        raise ValueError("it has no seal")
    if text != sealed(document).encode():
        raise ValueError("its seal does not fit")
    return document

"""Promotions: the evidence that is kept with a version, and whether it earned an alias."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrlhf.pipeline.tracking.models import MADE
from rrlhf.pipeline.tracking.server import Client, TrackingError
from rrlhf.types import Json

PREFIX = "rrlhf.gates"  # of the tags that tell the last decision
PROMOTED = "rrlhf.promoted"  # of the tag that lets a version have an alias: "<file of the evidence> <its sha256>"


def keep(client: Client, version: Any, evidence: Mapping[str, Json], file: str, tags: Mapping[str, str]) -> None:
    """Keep the evidence of a decision as a file of the version's run, and its short form as the version's tags.

    The tags are those of the last decision; the files of earlier ones stay.
    """
    found = client.get_model_version(version.name, version.version)
    text = json.dumps(evidence, indent=1)
    client.log_text(found.run_id, text, file)
    earned = f"{PROMOTED}.{evidence['to']}"
    if evidence["decision"] != "refused":
        tags = {**tags, earned: f"{file} {hashlib.sha256(text.encode()).hexdigest()}"}
    for tag in found.tags:
        if (tag.startswith(PREFIX) or tag == earned) and tag not in tags:
            client.delete_model_version_tag(version.name, version.version, tag)
    for tag, value in tags.items():
        client.set_model_version_tag(version.name, version.version, tag, value)


def fault(client: Client, version: Any, alias: str) -> str | None:
    """Say why a version should not have an alias, or None: the evidence must be there, unchanged and its own."""
    earned = version.tags.get(f"{PROMOTED}.{alias}")
    if earned is None:
        return f"alias {alias}: no decision gave it; `rrlhf promote --to {alias}` holds it against the gates"
    file, _, expected = earned.rpartition(" ")
    with tempfile.TemporaryDirectory(prefix="rrlhf-evidence-") as beside:
        try:
            text = Path(client.download_artifacts(version.run_id, file, beside)).read_bytes()
        except (OSError, TrackingError):
            return f"alias {alias}: its evidence {file} is gone"
    if (found := hashlib.sha256(text).hexdigest()) != expected:
        return f"alias {alias}: its evidence {file}: expected sha256 {expected}, found {found}"
    if (digest := json.loads(text)["digest"]) != json.loads(version.tags[MADE])["digest"]:
        return f"alias {alias}: its evidence {file} is that of {digest}"
    return None

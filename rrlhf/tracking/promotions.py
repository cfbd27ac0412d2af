"""Promotions: the evidence that is kept with a version, and the alias that moves to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rrlhf.types import Json

PREFIX = "rrlhf.gates"  # of the tags that tell the last decision


class Promotions:
    """What one server holds of decisions about versions."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def keep(self, name: str, version: str, evidence: Mapping[str, Json], file: str, tags: Mapping[str, str]) -> None:
        """Keep the evidence of a decision as a file of the version's run, and its short form as the version's tags.

        The tags are those of the last decision; the files of earlier ones stay.
        """
        found = self._client.get_model_version(name, version)
        self._client.log_dict(found.run_id, dict(evidence), file)
        for tag in found.tags:
            if tag.startswith(PREFIX) and tag not in tags:
                self._client.delete_model_version_tag(name, version, tag)
        for tag, value in tags.items():
            self._client.set_model_version_tag(name, version, tag, value)

    def move(self, name: str, version: str, alias: str) -> None:
        """Give a version the alias, which no other version of the name then has."""
        self._client.set_registered_model_alias(name, alias, version)

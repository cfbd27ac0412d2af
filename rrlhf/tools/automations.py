"""Prefect's automations of automations.yaml, made or brought up to date on a server; Prefect is not imported."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from rrlhf.pipeline.keys import key_digest

FILE = "automations.yaml"
DECLARED = "declared:"  # begins the tag that holds the digest of a declaration
SECONDS_TO_ANSWER = 30


def declare(api: str, file: Path) -> None:
    """Have every automation of a file on the server at `api`, found by its name.

    One that was made from the same declaration stays as it is: an update would forget which runs it watches.
    Raises OSError (urllib's HTTPError) when the server refuses.
    """
    for automation in yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]:
        tag = DECLARED + key_digest(automation)[:16]
        wanted = automation | {"tags": ["rrlhf", tag]}
        named = {"automations": {"name": {"any_": [automation["name"]]}}}
        found = _ask("POST", f"{api}/automations/filter", named)
        if not found:
            _ask("POST", f"{api}/automations/", wanted)
        elif tag not in found[0]["tags"]:
            _ask("PUT", f"{api}/automations/{found[0]['id']}", wanted)


def _ask(method: str, address: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"content-type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
        body = answer.read()
    return json.loads(body) if body else None

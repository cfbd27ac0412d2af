"""What comes from outside the pipeline: base models and source data."""

from __future__ import annotations

from typing import cast

from rrlhf.config import Model, Prepare, TrunkTraining
from rrlhf.data.files import source_digest
from rrlhf.memo import Memo
from rrlhf.models.sources import base_digest
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.stages import spec_of


def external_digests(node: Node, memo: Memo) -> dict[str, str]:
    """Return what identifies the inputs of a node that no other node makes: the base model and the source data."""
    found, reads = {}, spec_of(node.stage).base
    if reads == "model":
        found["base"] = base_digest(cast(Model, node.sections["model"]), memo)
    trunk = node.sections.get("trunk", node.sections.get("reward"))
    if reads == "trunk" and isinstance(trunk, TrunkTraining) and trunk.base is not None:
        found["base"] = base_digest(trunk.language_model(cast(Model, node.sections["model"])), memo, "reward")
    if node.stage == "prepare":
        found["source"] = source_digest(cast(Prepare, node.sections["prepare"]), memo)
    return found

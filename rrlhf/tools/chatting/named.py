"""The models of a conversation, found by what they were called: before torch is imported, for that takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrlhf.config import Model, Params
from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import MANIFEST, Artifact
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import STAGES
from rrlhf.tools.lineage.lookup import Lookup

ANSWERS = [stage for stage, spec in STAGES.items() if spec.makes == "language model"]


class Named(NamedTuple):
    """A model that can answer, under the name that it was asked for by."""

    name: str
    folder: Path
    model: Model
    artifact: Artifact | None  # None: a plain transformers folder


class Judge(NamedTuple):
    """The reward model that scores the answers."""

    artifact: Artifact
    sft: Path  # whose layers its heads may read


def find_models(
    root: Path, profile: str, params: Params, models: Sequence[str], ensemble: str | None
) -> tuple[list[Named], Judge | None]:
    """Return the models, and the ensemble that judges them: the one named, the first model's own, or the profile's.

    models: registered versions, aliases, digests, or folders of an artifact or of transformers. Raises UsageError that
    says what to do, and TamperedError when a stored file was changed.
    """
    lookup = Lookup(root, profile, params)
    found = [_model(lookup, reference, params.model) for reference in models]
    own = (each.artifact for each in found if each.artifact and "ensemble" in each.artifact.inputs)
    if ensemble:
        judge = lookup.find(ensemble)
        if judge.stage not in {"ensemble", "reward"}:
            raise UsageError(
                f"--ensemble {ensemble!r} is made by stage {judge.stage}; name an ensemble or reward model"
            )
    elif policy := next(own, None):
        judge = lookup.input_of(policy, "ensemble")
    elif default := Project(root, profile, params).artifact("ensemble"):
        judge = default
    else:
        return found, None
    reward = judge if judge.stage == "reward" else lookup.input_of(judge, "reward")
    return found, Judge(judge, lookup.input_of(reward, "sft").path)


def _model(lookup: Lookup, reference: str, usual: Model) -> Named:
    folder = Path(reference)
    if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        return Named(reference, folder, usual, None)
    artifact = lookup.find(reference)
    if artifact.stage not in ANSWERS:
        raise UsageError(
            f"{reference!r} is made by stage {artifact.stage}, which answers nothing; name one of {', '.join(ANSWERS)}"
        )
    own = Model.model_validate(artifact.manifest["document"]["params"]["model"])
    return Named(reference, artifact.path, own.model_copy(update={"device": usual.device}), artifact)

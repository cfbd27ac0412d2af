"""`rrlhf promote`: the gates, the evidence, and the alias."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rrlhf.located import UsageError
from rrlhf.locks import locked
from rrlhf.pipeline.artifacts import Artifact, git_commit
from rrlhf.tools.command_line import AsJson, Model, Profile, Set, opened
from rrlhf.tools.lineage.lookup import Lookup, graph_of

if TYPE_CHECKING:
    from rrlhf.pipeline.tracking.tracker import Version

EVIDENCE = "promotion"  # folder of the evidence among the files of a version's run

Decision = dict[str, Any]  # with its evidence, as it is kept: JSON


def promote(
    version: Model,
    to: Annotated[str, typer.Option(help="The alias to give: the current holder of it is the opponent.")] = "champion",
    override: Annotated[
        str | None, typer.Option(help="Promote although gates fail, for this reason, which is recorded.")
    ] = None,
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make a registered policy the champion, if it passes the gates of params.yaml; the evidence is kept with it.

    The version, the current champion (the SFT model where there is none) and the SFT model answer the evaluation
    prompts anew, and the same judges read all answers. A refusal is kept too, and ends with exit code 1.

    Example: rrlhf promote rrlhf-policy@candidate

    Example: rrlhf promote rrlhf-policy/3 --to champion --override "length is wanted here"
    """
    decision = decide(opened(profile, set_), version, to=to, override=override)
    if as_json:
        print(json.dumps(decision, indent=1))
    else:
        _show(decision)
    if decision["decision"] == "refused":
        print(f"refused: {', '.join(decision['failed'])}", file=sys.stderr)
        raise SystemExit(1)


def decide(lookup: Lookup, reference: str, *, to: str, override: str | None) -> Decision:
    """Hold a version against the gates, keep the evidence, and move the alias when it may be moved.

    Raises ValueError that says what to do, before anything is sampled, and TamperedError for a changed file.
    """
    check(to, override, list(lookup.params.arms))
    with locked(lookup.root / ".rrlhf" / "promoting"):
        version = named(reference, lookup.profile, lookup.versions)
        found = _weigh(lookup, version, to)
        outcome = "promoted" if not found["failed"] else "overridden" if override else "refused"
        decision = {**found, "decision": outcome, "override": override if outcome == "overridden" else None}
        file = f"{EVIDENCE}/{to}-{decision['when'].replace(':', '')}.json"
        # Evidence comes first: no champion is ever without it.
        lookup.tracker.models.keep_decision(version, decision, file, tags_of(decision, file))
        if outcome != "refused":
            lookup.tracker.models.give(version.name, version.version, to)
    return decision


def check(to: str, override: str | None, arms: Sequence[str]) -> None:
    """Raise UsageError for an alias that is not free, or an empty reason."""
    if not re.fullmatch(r"(?!v\d+$)[a-z][a-z0-9_-]{0,39}", to):
        raise UsageError(f"--to {to!r}: use lower-case letters, digits, - and _; not v1, v2 and so on")
    if to in {"latest", "candidate", *arms}:
        raise UsageError(f"--to {to!r}: every run gives this alias anew; choose another, for example champion")
    if override is not None and not override.strip():
        raise UsageError("--override needs a reason in words, which is recorded with the version")


def named(reference: str, profile: str, versions: Sequence[Version]) -> Version:
    """Return the version that a person means. Raises UsageError when there is none, or more than one."""
    found = graph_of(versions, profile).find(reference, profile)
    known = {f"{version.name}/{version.version}": version for version in versions}
    wanted = reference.removeprefix("models:/")  # a model may have names of several profiles
    names = sorted(found.names, key=lambda name: not name.startswith(f"{wanted.partition('@')[0]}/"))
    version = next((known[name] for name in (wanted, *names) if name in known), None)
    if version is None:
        raise UsageError(f"{reference!r} is {found.title}, which is not registered; name a registered policy")
    return version


def tags_of(decision: Decision, file: str) -> dict[str, str]:
    """Return the short form of a decision, for the version's tags."""
    from rrlhf.pipeline.tracking.models import GATES
    from rrlhf.tools.gates import in_words

    failed = f": {', '.join(decision['failed'])}" if decision["failed"] else ""
    told = {name: decision[name] for name in ("to", "against", "judge", "when", "override")}
    told |= {gate["name"]: in_words(gate)[:500] for gate in decision["gates"]}
    tags = {f"{GATES}.{name}": str(value) for name, value in told.items() if value is not None}
    return {GATES: f"{decision['decision']}{failed}", **tags, f"{GATES}.evidence": file}


def _weigh(lookup: Lookup, version: Version, to: str) -> Decision:
    """Measure a version and its opponent; nothing is kept yet."""
    from rrlhf.tools.auditing.audit import Audit
    from rrlhf.tools.gates import clean, measure

    name = f"{version.name}/{version.version}"
    if version.made["stage"] not in {"ppo", "dpo"}:
        raise UsageError(f"{name} is no trained policy; name a version of a policy")
    artifact = lookup.find(name)
    holder = next((each for each in lookup.versions if each.name == version.name and to in each.aliases), None)
    if holder == version:
        raise ValueError(f"{name} is the {to} already")
    against = f"{holder.name}/{holder.version}" if holder else "the SFT model that it started from"
    opponent = lookup.find(against) if holder else lookup.input_of(artifact, "sft")
    judges = {name: _judge(lookup, artifact, name) for name in ("sft", "reward", "ensemble")}
    models = {**judges, "candidate": artifact, "opponent": opponent}
    found = measure(_data(lookup, artifact), models, lookup.params)
    broken = Audit(lookup).run(lookup.graph.find(name)).broken
    gates = [*found["gates"], clean([each.problem for each in broken])]
    return {
        "version": name,
        "digest": artifact.digest,
        "to": to,
        "against": against,
        "against_digest": opponent.digest,
        "failed": [gate["name"] for gate in gates if not gate["passed"]],
        **found,
        "gates": gates,
        "samples_per_prompt": lookup.params.evaluate.samples_per_prompt,
        "seed": lookup.params.seed,
        "dataset": artifact.inputs["data"],
        "inputs": {name: judge.digest for name, judge in judges.items()},
        "git_commit": git_commit(lookup.root),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _data(lookup: Lookup, artifact: Artifact) -> Path:
    """Return the version's own data set: it may have been trained on the evaluation prompts of another."""
    dataset = lookup.project.data()
    if dataset is None or dataset.digest != artifact.inputs["data"]:
        raise ValueError(
            f"{artifact.name} was trained on data {artifact.inputs['data']}, and profile {lookup.profile} has "
            f"{dataset.digest if dataset else 'none here'}: name the --profile and --set that it was made with"
        )
    return dataset.path


def _judge(lookup: Lookup, artifact: Artifact, name: str) -> Artifact:
    """Return a model that the version was trained with.

    Where it has no reward models (DPO), that of the profile, if it stands on the same SFT model.
    """
    if name in artifact.inputs:
        return lookup.input_of(artifact, name)
    found, sft = (lookup.project.artifact(each) for each in (name, "sft"))
    if found is None or sft is None or sft.digest != artifact.inputs["sft"]:
        raise ValueError(
            f"{artifact.name} has no reward models of its own, and profile {lookup.profile} has none on its SFT "
            "model: `rrlhf run` with the settings that it was made with comes first"
        )
    return found


def _show(decision: Decision) -> None:
    from rrlhf.tools.gates import in_words

    print(f"{decision['version']} against {decision['against']}, judged by {decision['judge']}")
    width = max(len(gate["name"]) for gate in decision["gates"])
    for gate in decision["gates"]:
        print(f"{'pass' if gate['passed'] else 'FAIL'}  {gate['name']:{width}}  {in_words(gate)}")
    although = (
        f", although {', '.join(decision['failed'])} failed: {decision['override']}" if decision["failed"] else ""
    )
    if decision["decision"] != "refused":
        print(f"{decision['version']} is now {decision['to']}{although}")

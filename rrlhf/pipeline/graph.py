"""The graph: every node that a run consists of, declared once for the flow, the plan and the keys."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rrlhf.config import (
    Arm,
    Given,
    HeadEnsemble,
    LoraEnsemble,
    Member,
    OwnModel,
    PaidArm,
    Params,
    Section,
    TrunkTraining,
    WarmEnsemble,
)
from rrlhf.pipeline.stages import STAGES

DATA = "data"
EXTERNAL = ("base", "judge", "source")  # inputs that no node makes (rrlhf/pipeline/keys.py)


class Node(NamedTuple):
    """One unit of work: a stage, the sections of params it may read, and the nodes whose results it reads.

    `inputs` maps the stage function's argument to a node's name. Nothing else reaches the stage but reward functions,
    so nothing else belongs to its key.
    """

    name: str
    stage: str
    sections: dict[str, Section | int]
    inputs: dict[str, str]
    functions: tuple[str, ...] = ()  # import paths of the reward functions that it calls
    arm: str | None = None  # whose policy it makes

    @property
    def settings(self) -> dict[str, Any]:
        """The sections as JSON."""
        return {
            name: value.model_dump() if isinstance(value, Section) else value for name, value in self.sections.items()
        }


def nodes(params: Params) -> list[Node]:
    """Return all nodes in an order in which each follows its inputs; data preparation comes first."""
    sections: dict[str, Any] = dict(params)
    arms = [_policy(name, arm, sections) for name, arm in params.arms.items()]
    evaluate = _node("evaluate", "evaluate", sections)
    return [
        _node(DATA, "prepare", sections),
        _node("sft", "sft", sections),
        _given("reward", params.reward, params) if params.reward.head == "own" else _node("reward", "reward", sections),
        *_reward_ensemble(params, sections),
        *arms,
        evaluate._replace(
            inputs={**evaluate.inputs, **{arm.name: arm.name for arm in arms}},
            functions=tuple(sorted({path for arm in arms for path in arm.functions})),
        ),
    ]


def _node(name: str, stage: str, sections: Mapping[str, Any]) -> Node:
    """Return a node with what its stage reads, as declared."""
    spec = STAGES[stage]
    return Node(name, stage, {each: sections[each] for each in spec.settings}, {each: each for each in spec.reads})


def _given(name: str, model: OwnModel, params: Params) -> Node:
    """Return the node of a reward model that is used as it is."""
    told = model.model_dump(include=set(Given.model_fields))
    told["batch_size"] = told["batch_size"] or params.reward.batch_size
    return _node(name, "given", {"model": params.model, "given": Given.model_validate(told)})


def _policy(name: str, arm: Arm, sections: Mapping[str, Any]) -> Node:
    node = _node(f"{arm.method}-{name}", arm.method, {**sections, "arm": arm})
    return node._replace(functions=tuple(sorted(arm.functions)) if isinstance(arm, PaidArm) else (), arm=name)


def _reward_ensemble(params: Params, sections: Mapping[str, Any]) -> list[Node]:
    """Return the ensemble's node, behind its members' when it has some.

    A member knows neither how many there are nor what becomes of them: one more trains one, and averaging trains none.
    """
    ensemble, node = params.ensemble, _node("ensemble", "ensemble", sections)
    trunk = TrunkTraining.model_validate(params.reward.model_dump(include=set(TrunkTraining.model_fields)))
    with_trunk = node._replace(sections={**node.sections, "trunk": trunk})
    if isinstance(ensemble, HeadEnsemble) and ensemble.freeze_backbone:
        return [node]
    if isinstance(ensemble, HeadEnsemble | LoraEnsemble):
        return [with_trunk._replace(inputs={DATA: DATA, "sft": "sft", **node.inputs})]
    member = Member.model_validate(ensemble.model_dump(include=set(Member.model_fields)))
    own = {**sections, "member": member, "trunk": trunk}
    members = [
        _node(f"member-{number}", "member", {**own, "seed": 1000 * params.seed + number})
        for number in range(ensemble.heads)
    ]
    given = [_given(f"given-{number}", each, params) for number, each in enumerate(ensemble.models)]
    inputs = {**node.inputs, **{each.name: each.name for each in [*given, *members]}}
    if isinstance(ensemble, WarmEnsemble):
        return [*members, with_trunk._replace(inputs={DATA: DATA, **inputs})]
    if given and members:  # which may read the SFT model's layers
        inputs["sft"] = "sft"
    return [*given, *members, node._replace(inputs=inputs)]

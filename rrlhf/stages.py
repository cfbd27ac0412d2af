"""The graph: every node that a run consists of, declared once for the flow, the plan and the keys."""

from __future__ import annotations

from typing import Any, NamedTuple

from rrlhf.config import Member, Params, Section, TrunkTraining

DATA = "data"


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

    @property
    def settings(self) -> dict[str, Any]:
        """The sections as JSON."""
        return {
            name: value.model_dump() if isinstance(value, Section) else value for name, value in self.sections.items()
        }


def nodes(params: Params) -> list[Node]:
    """Return all nodes in an order in which each follows its inputs; data preparation comes first."""
    seed, model = params.seed, params.model
    base = {DATA: DATA, "sft": "sft"}
    arms = {f"ppo-{name}": arm for name, arm in params.arms.items()}
    return [
        Node(DATA, "prepare", {"seed": seed, "model": model, "prepare": params.prepare, "gold": params.gold}, {}),
        Node("sft", "sft", {"seed": seed, "model": model, "sft": params.sft}, {DATA: DATA}),
        Node("reward", "reward", {"seed": seed, "model": model, "reward": params.reward}, base),
        *_reward_ensemble(params),
        *(
            Node(
                name,
                "ppo",
                {"model": model, "ppo": params.ppo, "health": params.health, "arm": arm},
                {**base, "reward": "reward", "ensemble": "ensemble"},
                tuple(sorted(arm.functions)),
            )
            for name, arm in arms.items()
        ),
        Node(
            "evaluate",
            "evaluate",
            {"seed": seed, "model": model, "gold": params.gold, "evaluate": params.evaluate},
            {**base, "reward": "reward", "ensemble": "ensemble", **{name: name for name in arms}},
            tuple(sorted({path for arm in arms.values() for path in arm.functions})),
        ),
    ]


def _reward_ensemble(params: Params) -> list[Node]:
    """Return the ensemble's node, behind its members' when it has some.

    A member knows neither how many there are nor what becomes of them: one more trains one, and averaging trains none.
    """
    seed, model, ensemble = params.seed, params.model, params.ensemble
    before = {DATA: DATA, "sft": "sft", "reward": "reward"}
    trunk = TrunkTraining.model_validate(params.reward.model_dump(include=set(TrunkTraining.model_fields)))
    sections: dict[str, Section | int] = {"seed": seed, "model": model, "ensemble": ensemble}
    if ensemble.kind in {"members", "warm"}:
        member = Member.model_validate(ensemble.model_dump(include=set(Member.model_fields)))
        members = [
            Node(
                f"member-{number}",
                "member",
                {"seed": 1000 * seed + number, "model": model, "member": member, "trunk": trunk},
                before,
            )
            for number in range(ensemble.heads)
        ]
        names = {node.name: node.name for node in members}
        if ensemble.kind == "members":
            return [*members, Node("ensemble", "ensemble", sections, {"reward": "reward", **names})]
        inputs = {DATA: DATA, "reward": "reward", **names}
        return [*members, Node("ensemble", "ensemble", sections | {"trunk": trunk}, inputs)]
    if ensemble.kind == "lora" or not ensemble.freeze_backbone:
        return [Node("ensemble", "ensemble", sections | {"trunk": trunk}, before)]
    return [Node("ensemble", "ensemble", sections, {"reward": "reward"})]

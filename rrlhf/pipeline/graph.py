"""The graph: every node that a run consists of, declared once for the flow, the plan and the keys."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from rrlhf.config import Arm, Member, Method, Params, Section, TrunkTraining

DATA = "data"
EXTERNAL = ("base", "source")  # inputs that no node makes (rrlhf/pipeline/external.py)
METHODS: tuple[str, ...] = get_args(Method)  # the stages that make a policy
GENERATES = {"sft", "ppo", "dpo"}  # stages whose artifact is a transformers folder, which rrlhf.loader can load
MODEL_NAMES = {  # the stages that make a model, and what it is called in the registry (`model_name`)
    "sft": "sft",
    "reward": "reward",
    "member": "reward-member",
    "ensemble": "ensemble",
    "ppo": "policy",
    "dpo": "policy",
    "best_of_n": "best-of-n",  # a rule over the SFT model's responses: apart from the policies that one can load
}


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
    arms = [_arm(params, name, arm) for name, arm in params.arms.items()]
    return [
        Node(DATA, "prepare", {"seed": seed, "model": model, "prepare": params.prepare, "gold": params.gold}, {}),
        Node("sft", "sft", {"seed": seed, "model": model, "sft": params.sft}, {DATA: DATA}),
        Node("reward", "reward", {"seed": seed, "model": model, "reward": params.reward}, base),
        *_reward_ensemble(params),
        *arms,
        Node(
            "evaluate",
            "evaluate",
            {"seed": seed, "model": model, "gold": params.gold, "evaluate": params.evaluate},
            {**base, "reward": "reward", "ensemble": "ensemble", **{arm.name: arm.name for arm in arms}},
            tuple(sorted({path for arm in params.arms.values() for path in arm.functions})),
        ),
    ]


def arm_of(name: str) -> str | None:
    """Return the arm's name of a node, METHOD-ARM; None for a node that makes no policy."""
    method, dash, arm = name.partition("-")
    return arm if dash and method in METHODS else None


def model_name(stage: str, profile: str) -> str:
    """Return the name under which a profile's models of a stage are registered: "rrlhf-policy", "rrlhf-tiny-policy".

    So versions and aliases of two profiles never mix. Empty for a stage that makes no model.
    """
    if stage not in MODEL_NAMES:
        return ""
    return "-".join(["rrlhf", *([profile] if profile != "default" else []), MODEL_NAMES[stage]])


def profile_of(name: str, stage: str) -> str | None:
    """Return the profile whose models of a stage have this name; None when it is no such name."""
    before = name.removesuffix(f"-{MODEL_NAMES.get(stage)}")
    if before == name or not f"{before}-".startswith("rrlhf-"):
        return None
    return before.removeprefix("rrlhf").removeprefix("-") or "default"


def aliases_of(name: str, candidate: str) -> list[str]:
    """Return the aliases by which a node's model is registered: its arm, and "candidate" for the arm chosen as that."""
    arm = arm_of(name)
    return [*([arm] if arm else []), *(["candidate"] if arm == candidate else [])]


def _arm(params: Params, name: str, arm: Arm) -> Node:
    """Return the node that makes an arm's policy."""
    method: dict[str, Section] = {"ppo": params.ppo, "dpo": params.dpo, "best_of_n": params.best_of_n}
    inputs = {DATA: DATA, "sft": "sft"}
    if arm.method != "dpo":
        inputs |= {"reward": "reward", "ensemble": "ensemble"}
    sections: dict[str, Section | int] = {"model": params.model, arm.method: method[arm.method], "arm": arm}
    if arm.method == "ppo":
        sections["health"] = params.health
    return Node(f"{arm.method}-{name}", arm.method, sections, inputs, tuple(sorted(arm.functions)))


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

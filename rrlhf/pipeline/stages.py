"""Every stage, declared once: what it reads, what it makes, and how people are told of it. All else reads this.

A stage of this name is the function `run` of rrlhf/stages/NAME.py.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

NORMALISED = "normalised score"
SHARE = "share, 0 to 1"
NONE = "–"
CUT = ("cut_prompts", "cut_responses", "cut_pairs")  # shares, of every stage that reads texts
_REWARD_MODEL = {
    SHARE: ("heldout_accuracy", "heldout_accuracy_READING", "heldout_ece", "heldout_mce"),
    "share": ("heldout_accuracy_stderr", "heldout_accuracy_READING_stderr"),
    "0 to 1": ("heldout_brier",),
    "−1 to 1": ("head_correlation",),
    "nats": ("heldout_nll",),
    "nats, or squared reward": ("loss",),
    "as `loss`": ("trunk_loss",),
    NORMALISED: ("head_spread", "head_std"),
}
_PAIRS = ("preferences", "heldout")


class StageSpec(NamedTuple):
    """What is known of a stage. The defaults are those of one that makes no model."""

    settings: tuple[str, ...] = ()  # sections that `run` is given: of the params, or the node's own, such as its arm
    reads: tuple[str, ...] = ()  # nodes whose folders it is given; of an ensemble and the comparison there are more
    tables: tuple[str, ...] | None = None  # of the data set, those that it looks into; None: any
    base: Literal["", "model", "trunk"] = ""  # the settings of the language model that it reads from outside
    processes: bool = False  # whether several may share its work
    many: str = (
        ""  # the argument by which all of its nodes together are given, where there is one for each arm or member
    )
    model: str = ""  # what its models are called in the registry; a stage without makes none
    makes: Literal["", "language model", "reward model", "candidates"] = ""  # of these the first: a transformers folder
    title: str = ""  # of a model's card; {name}: its node's, {arm}: its arm's
    about: str = ""  # how a model was made, for its card; see `rrlhf.pipeline.cards.what`
    tag: str = "reward-model"  # by which the Hugging Face hub finds its models
    telling: tuple[str, ...] | None = None  # the numbers that say most of a result; None: a policy's gold or proxy
    units: Mapping[str, tuple[str, ...]] = {}  # the names in each unit, as docs/metrics.md has them

    @property
    def is_policy(self) -> bool:
        """Whether it is a method by which an arm's policy is made."""
        return self.many == "policies"


STAGES = {
    "prepare": StageSpec(settings=("seed", "model", "prepare", "gold"), base="model"),
    "sft": StageSpec(
        settings=("seed", "model", "sft"),
        reads=("data",),
        tables=("sft",),
        base="model",
        processes=True,
        model="sft",
        makes="language model",
        title="SFT model",
        about="The base model, fine-tuned on demonstrations. Every policy starts here; KL is measured from here.",
        tag="sft",
        telling=("loss",),
        units={"nats per token": ("loss",), "tokens": ("tokens",)},
    ),
    "reward": StageSpec(
        settings=("seed", "model", "reward"),
        reads=("data", "sft"),
        tables=_PAIRS,
        base="trunk",
        model="reward",
        makes="reward model",
        title="Reward model",
        about="A reward model with a single head, by maximum likelihood of the preferences (Bradley-Terry). Its score "
        "is the proxy: what plain PPO maximises, and by which every policy is compared.",
        telling=("heldout_accuracy",),
        units=_REWARD_MODEL,
    ),
    "given": StageSpec(
        settings=("model", "given"),
        reads=("data",),
        tables=_PAIRS,
        base="trunk",
        many="members",
        model="reward-given",
        makes="reward model",
        title="Reward model as it was given, {name}",
        about="A reward model that was made elsewhere, with its own head. The preference pairs say how sure it is of a "
        "score; on the held-out ones its scores are normalised.",
        telling=("heldout_accuracy",),
        units=_REWARD_MODEL,
    ),
    "member": StageSpec(
        settings=("seed", "model", "member", "trunk"),
        reads=("data", "sft", "reward"),
        tables=_PAIRS,
        base="trunk",
        many="members",
        model="reward-member",
        makes="reward model",
        title="Reward ensemble, {name}",
        about="One member of a reward ensemble; it serves its ensemble alone.",
        telling=("heldout_accuracy",),
        units=_REWARD_MODEL,
    ),
    "ensemble": StageSpec(
        settings=("seed", "model", "ensemble"),
        reads=("reward",),
        tables=_PAIRS,
        model="ensemble",
        makes="reward model",
        title="Reward ensemble",
        about="A reward ensemble of {heads} Gaussian heads (kind `{kind}`). A robust policy is paid by an aggregation "
        "of them, which trusts no reward that only one head believes in.",
        telling=("heldout_accuracy_mean",),
        units=_REWARD_MODEL,
    ),
    "ppo": StageSpec(
        settings=("model", "ppo", "arm", "health"),
        reads=("data", "sft", "reward", "ensemble"),
        tables=("ppo",),
        processes=True,
        many="policies",
        model="policy",
        makes="language model",
        title="Policy {arm}, by PPO",
        about="The SFT model after PPO on the reward {reward}.",
        tag="ppo",
        telling=("proxy", "kl"),
        units={
            NORMALISED: ("score", "score_std", "proxy", "nominal", "worst", "spread", "sigma", "head_N"),
            SHARE: ("head_N_nominal", "repetition", "finished", "clip_fraction"),
            "of the function": ("function_NAME",),
            "nats per response": ("kl", "kl_k3"),
            "nats per token": ("kl_loss", "entropy", "step_kl"),
            "reward per nat": ("kl_weight",),
            "tokens per response": ("response_tokens",),
            "tokens / s": ("tokens_per_second",),
            "advantage": ("policy_loss",),
            "squared reward": ("value_loss",),
            "share, up to 1": ("explained_variance",),
            "steps": ("optimizer_steps", "skipped_steps"),
            "0 or 1": ("kl_budget_exceeded",),
            "1": ("health_NAME", "diverged"),
        },
    ),
    "dpo": StageSpec(
        settings=("model", "dpo", "arm"),
        reads=("data", "sft"),
        tables=_PAIRS,
        processes=True,
        many="policies",
        model="policy",
        makes="language model",
        title="Policy {arm}, by DPO",
        about="The SFT model after direct preference optimisation (loss `{loss}`). It saw no reward model.",
        tag="dpo",
        telling=("heldout_accuracy", "loss"),
        units={
            SHARE: ("accuracy", "heldout_accuracy"),
            "nats per pair; with `dpo.loss` `ipo` squared": ("loss", "heldout_loss"),
            "implicit reward": (
                *("margin", "chosen_reward", "rejected_reward"),
                *("heldout_margin", "heldout_chosen_reward", "heldout_rejected_reward"),
            ),
        },
    ),
    "best_of_n": StageSpec(
        settings=("model", "best_of_n", "arm"),
        reads=("data", "sft", "reward", "ensemble"),
        tables=("evaluate",),
        many="policies",
        model="best-of-n",  # apart from the policies that one can load
        makes="candidates",
        title="Policy {arm}, best of n",
        about="No trained model but a rule over one, the SFT model: sample {n} responses at temperature 1 and answer "
        "with the one that the reward {reward} likes best. `candidates.parquet` holds {samples} responses to each "
        "evaluation prompt.",
        tag="best-of-n",
        telling=("reward", "kl_bound"),
        units={"the arm's reward": ("reward",), "nats per response": ("kl_bound",)},
    ),
    "evaluate": StageSpec(
        settings=("seed", "model", "gold", "evaluate"),
        reads=("data", "sft", "reward", "ensemble"),
        tables=("evaluate", "ppo"),
        base="model",  # for the gold judge (rrlhf/judging/surprise.py)
    ),
}


def spec_of(stage: str) -> StageSpec:
    """Return what is known of a stage; of one that is not of this package, nothing."""
    return STAGES.get(stage, StageSpec())


def kind_of(stage: str) -> str:
    """Return what nodes have in common that may run side by side: their stage, of a policy that it is an arm."""
    return "arm" if spec_of(stage).is_policy else stage


def telling(stage: str, metrics: Mapping[str, float]) -> str:
    """Return the numbers that say most of a result; of a comparison every policy's gold, or what stands for it."""
    names = spec_of(stage).telling
    if names is None:
        told = ([name for name in metrics if name.endswith(end)] for end in ("_gold", "_judge_win_rate", "_proxy"))
        names = tuple(next(filter(None, told), ()))
    return ", ".join(f"{name} {metrics[name]:.3g}" for name in names if name in metrics)


def cut_shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each kind of text that a stage cut, 0 to 1, by kind: prompts, responses, pairs."""
    return {name.removeprefix("cut_"): metrics[name] for name in CUT if name in metrics}


def unit(stage: str, metric: str) -> str:
    """Return the unit of a metric that a stage logs; a dash where it has none.

    The glossary has one name for many: "head_3" is its "head_N".
    """
    name = re.sub(r"^head_\d+", "head_N", metric)
    name = re.sub(r"^(heldout_accuracy)_(?!stderr$)[a-z]+", r"\1_READING", name)
    name = re.sub(r"^(health|function)_.*", r"\1_NAME", name)
    units = {SHARE: CUT} if name in CUT else spec_of(stage).units
    return next((unit for unit, names in units.items() if name in names), NONE)


def model_name(stage: str, profile: str) -> str:
    """Return the name under which a profile's models of a stage are registered: "rrlhf-policy", "rrlhf-tiny-policy".

    So versions and aliases of two profiles never mix. Empty for a stage that makes no model.
    """
    own = spec_of(stage).model
    return "-".join(["rrlhf", *([profile] if profile != "default" else []), own]) if own else ""


def profile_of(name: str, stage: str) -> str | None:
    """Return the profile whose models of a stage have this name; None when it is no such name."""
    before = name.removesuffix(f"-{spec_of(stage).model}")
    if before == name or not f"{before}-".startswith("rrlhf-"):
        return None
    return before.removeprefix("rrlhf").removeprefix("-") or "default"


def arm_of(name: str) -> str | None:
    """Return the arm of a finished result, whose record has no more than its name, METHOD-ARM; None for no policy."""
    method, dash, arm = name.partition("-")
    return arm if dash and spec_of(method).is_policy else None


def aliases_of(arm: str | None, candidate: str | None) -> list[str]:
    """Return the aliases of an arm's model: its name, and "candidate" for the arm that is chosen as that."""
    if arm is None:
        return []
    return [arm, *(["candidate"] if arm == candidate else [])]

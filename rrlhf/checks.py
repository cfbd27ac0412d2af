"""Settings that are fine alone and wrong together."""

from collections.abc import Iterator

from rrlhf.config import (
    BestOfNArm,
    Ensemble,
    GivenEnsemble,
    HeadEnsemble,
    LoraEnsemble,
    PaidArm,
    Params,
    Ppo,
    Prepare,
    Reward,
)
from rrlhf.config import WarmEnsemble as Warm
from rrlhf.located import did_you_mean

Mistake = tuple[str, str]  # the setting to blame, and what is wrong with it

# Settings of the Bradley-Terry loss, with the value that changes nothing.
BRADLEY_TERRY_ONLY = {"margin": 0.0, "centring": 0.0, "label_smoothing": 0.0, "dro_temperature": None}


def contradictions(params: Params) -> Iterator[Mistake]:
    """Yield every contradiction between settings."""
    yield from _preparation(params.prepare)
    yield from _training(params)
    yield from _advantages_and_kl(params.ppo)
    yield from _reward_models(params.reward, params.ensemble)
    yield from _arms(params)


def _preparation(prepare: Prepare) -> Iterator[Mistake]:
    total = sum(prepare.shares.model_dump().values())
    if abs(total - 1) > 1e-9:
        yield "prepare.shares", f"they sum to {total:g}, not to 1"
    if (prepare.source == "written") != (prepare.format == "written"):
        yield "prepare.format", "prepare.source and prepare.format must be `written` together, or neither"
    if prepare.source == "written":
        for name in ("revision", "config", "split"):
            if getattr(prepare, name) is not None:
                yield f"prepare.{name}", "it belongs to a hub data set; written tasks have none: set null"


def _training(params: Params) -> Iterator[Mistake]:
    ppo, dpo, launch = params.ppo, params.dpo, params.launch
    if ppo.responses_per_update % ppo.minibatch_size:
        per_prompt = f" * responses_per_prompt {ppo.responses_per_prompt}" if ppo.responses_per_prompt > 1 else ""
        told = f"prompts_per_update {ppo.prompts_per_update}{per_prompt}"
        yield "ppo.minibatch_size", f"{ppo.minibatch_size} does not divide {told}"
    for name, size in (
        ("sft.batch_size", params.sft.batch_size),
        ("dpo.pairs_per_batch", dpo.pairs_per_batch),
        ("ppo.minibatch_size", ppo.minibatch_size),
        ("ppo.prompts_per_update", ppo.prompts_per_update),
    ):
        if size % launch.processes:
            yield name, f"{size} is not a multiple of launch.processes {launch.processes}"
    if dpo.loss != "sigmoid" and dpo.label_smoothing:
        yield "dpo.label_smoothing", f"it belongs to the loss sigmoid, not to {dpo.loss}"
    if launch.processes > 1 and launch.arms_at_once > 1:
        yield "launch.arms_at_once", "it must be 1 where launch.processes is above 1"


def _advantages_and_kl(ppo: Ppo) -> Iterator[Mistake]:
    if ppo.estimator in {"rloo", "grpo"} and ppo.responses_per_prompt < 2:
        yield (
            "ppo.responses_per_prompt",
            f"ppo.estimator {ppo.estimator} compares responses to one prompt: set 2 or more",
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield (
            "ppo.kl_estimator",
            "k1 has a gradient of expectation 0, so in the loss it holds nothing: set it to k2 or k3, or ppo.kl_in to "
            "reward",
        )
    if ppo.kl_target is not None and ppo.kl_weight == 0:
        yield "ppo.kl_weight", "0 stays 0 whatever ppo.kl_target: start above 0"
    if ppo.kl_target is not None and ppo.max_kl is not None and ppo.max_kl <= ppo.kl_target:
        yield "ppo.max_kl", f"{ppo.max_kl:g} ends the training before ppo.kl_target {ppo.kl_target:g}"


def _reward_models(reward: Reward, ensemble: Ensemble) -> Iterator[Mistake]:
    if ensemble.loss != "bradley_terry":
        for name, neutral in BRADLEY_TERRY_ONLY.items():
            if getattr(ensemble, name) != neutral:
                yield f"ensemble.{name}", f"it belongs to the loss bradley_terry, not to {ensemble.loss}"
    trains = reward.trunk != "frozen" or isinstance(ensemble, LoraEnsemble)
    if trains and reward.train_layers > reward.layer:
        yield "reward.train_layers", f"{reward.train_layers} is more than the {reward.layer} layers of the trunk"
    if reward.revision is not None and reward.base is None:
        yield "reward.revision", "it is the commit of reward.base, which is null"
    if isinstance(ensemble, HeadEnsemble) and not ensemble.freeze_backbone and reward.trunk == "frozen":
        yield "ensemble.freeze_backbone", "it is false: set reward.trunk to lora or full"
    if reward.head == "own" and reward.base is None:
        yield "reward.head", "own is that of a reward model of yours: name it in reward.base"
    if reward.head == "own" and reward.trunk != "frozen":
        yield "reward.trunk", "reward.head own takes a reward model as it is: set frozen, or reward.head to trained"
    if ensemble.models and not isinstance(ensemble, GivenEnsemble):
        yield "ensemble.models", f"they belong to kind given, not to {ensemble.kind}"
    if isinstance(ensemble, GivenEnsemble) and ensemble.sigma != "posterior":
        yield "ensemble.sigma", "reward models as they are have learned none: set posterior"
    if isinstance(ensemble, GivenEnsemble) and ensemble.heads and ensemble.hidden:
        yield "ensemble.hidden", "beside reward models as they are stand linear heads: set 0, or ensemble.heads to 0"
    if isinstance(ensemble, Warm) and reward.trunk == "frozen" and ensemble.hidden:
        yield "ensemble.hidden", "kind warm on a frozen trunk averages linear heads: set 0, or train the trunk"


def _arms(params: Params) -> Iterator[Mistake]:
    candidate, samples = params.tracking.candidate, params.best_of_n.samples
    if candidate not in params.arms:
        yield "tracking.candidate", f"{candidate!r} is not an arm{did_you_mean(candidate, params.arms)}"
    elif isinstance(params.arms[candidate], BestOfNArm):
        yield (
            "tracking.candidate",
            f"{candidate!r} chooses the best of n and is no model of its own: name an arm of method ppo or dpo",
        )
    for name, arm in params.arms.items():
        if isinstance(arm, PaidArm) and arm.reward == "ellipsoid" and params.ensemble.sigma != "posterior":
            yield f"arms.{name}.reward", "ellipsoid is that of a posterior: set ensemble.sigma to posterior"
        if isinstance(arm, BestOfNArm) and samples is not None and samples < arm.n:
            yield f"arms.{name}.n", f"{arm.n} is more than best_of_n.samples {samples}: raise that, or set it to null"

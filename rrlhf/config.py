"""All settings as frozen, typed sections: what may stand in params.yaml (rrlhf/pipeline/params.py reads it)."""

import re
from datetime import date
from functools import reduce
from inspect import signature
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    Tag,
    TypeAdapter,
    create_model,
    model_serializer,
)

from rrlhf.redact import VARIABLE
from rrlhf.robust import AGGREGATIONS

PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _day(value: object) -> object:
    """Return a day as text; YAML reads one that is not quoted as a date."""
    text = value.isoformat() if isinstance(value, date) else value
    if isinstance(text, str):
        date.fromisoformat(text)  # raises ValueError
    return text


Day = Annotated[str, BeforeValidator(_day)]  # 2025-01-31

# Of an arm's reward. Which of them a reward of rrlhf/robust.py has, its arguments tell.
REWARD_SETTINGS: dict[str, Any] = {
    "nominal_weight": Share,  # share of the most confident head's reward
    "credible": NonNegative,  # how far the worst case goes, in sigma
    "uncertainty_weight": NonNegative,  # what disagreement costs
    "temperature": PositiveFloat,  # low means careful
}
NOT_ARMS = ("candidate", "data", "latest", "sft")  # names and aliases of something else
REWARDS = {"single": ()} | {name: tuple(signature(reward).parameters)[1:] for name, reward in AGGREGATIONS.items()}


class Section(BaseModel):
    """A frozen group of settings; unknown keys and lax types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Section):
    """The language model that every stage shares."""

    base: str
    revision: str | None
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    save_dtype: Literal["auto", "float32", "bfloat16"]
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # as records without it had it
    gradient_checkpointing: bool = False
    date: Day
    system_prompt: str | None
    prompt_tokens: PositiveInt
    response_tokens: PositiveInt


class Shares(Section):
    """How prompts are split; the shares sum to 1."""

    sft: Share
    preferences: Share
    heldout: Share
    ppo: Share
    evaluate: Share


class Prepare(Section):
    """The data stage."""

    source: str
    format: Literal["written", "hh", "ultrafeedback", "rows"]
    revision: str | None
    config: str | None
    split: str | None
    limit: PositiveInt | None
    max_rejected: Share
    shares: Shares
    answers_per_prompt: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat
    flip_rate: Annotated[float, Field(ge=0, lt=0.5)]
    batch_size: PositiveInt


class Gold(Section):
    """Weights of the independent judge."""

    relevance: NonNegative
    tone: NonNegative
    repetition: NonNegative
    nonwords: NonNegative
    gibberish: NonNegative
    cutoff: NonNegative
    brevity: NonNegative


class Sft(Section):
    """Supervised fine-tuning."""

    temperature: PositiveFloat
    train_layers: PositiveInt | None
    epochs: PositiveInt
    batch_size: PositiveInt
    microbatch_size: PositiveInt
    learning_rate: PositiveFloat
    max_grad_norm: PositiveFloat
    keep_states: bool = True


class Fit(Section):
    """How reward heads are fitted to features."""

    epochs: PositiveInt
    pairs_per_batch: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegative


class HeadTraining(Fit):
    """What every reward head's training needs; from `margin` on, of the Bradley-Terry loss alone."""

    margin: NonNegative
    centring: NonNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    dro_temperature: PositiveFloat | None
    dro_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class OwnModel(Section):
    """A language model of a reward model's own; null: as the one of all stages."""

    base: str | None
    revision: str | None
    prompt_tokens: PositiveInt | None
    response_tokens: PositiveInt | None

    def language_model(self, shared: Model) -> Model:
        """Return the settings of the language model that these layers are of; shared: the one of all stages."""
        given = {"prompt_tokens": self.prompt_tokens, "response_tokens": self.response_tokens}
        own = {"base": self.base, "revision": self.revision} if self.base is not None else {}
        return shared.model_copy(update=own | {name: limit for name, limit in given.items() if limit is not None})


class Given(OwnModel):
    """A reward model that people have, a sequence classifier with one label, used as it is, with its own head."""

    base: str
    revision: str | None = None
    prompt_tokens: PositiveInt | None = None
    response_tokens: PositiveInt | None = None
    batch_size: PositiveInt | None = None  # null: as reward.batch_size; of a judge, evaluate.batch_size


class TrunkTraining(OwnModel):
    """The layers below the reward heads: where they come from, and how they train."""

    layer: PositiveInt
    batch_size: PositiveInt
    trunk: Literal["frozen", "lora", "full"]
    train_layers: PositiveInt
    lora_rank: PositiveInt
    trunk_epochs: PositiveInt
    trunk_pairs_per_batch: PositiveInt
    trunk_learning_rate: PositiveFloat
    trunk_max_grad_norm: PositiveFloat


class Reward(HeadTraining, TrunkTraining):
    """The single reward head and the trunk features that all heads share."""

    head: Literal["trained", "own"] = Field(default="trained", exclude_if=lambda head: head == "trained")


class Member(HeadTraining):
    """One head of an ensemble; a member that is a reward model of its own knows no more than this."""

    hidden: Annotated[int, Field(ge=0)]
    loss: Literal["reparam_mse", "gaussian_nll", "bradley_terry"]
    target: Literal["stage1_reward", "margin"]
    head_data: Literal["bootstrap", "all"]
    sigma: Literal["posterior", "learned"]
    sigma_floor: PositiveFloat


class Ensemble(Member):
    """The ensemble of reward models, of one of five kinds."""

    kind: str
    heads: PositiveInt
    models: list[Given] = Field(default=[], exclude_if=lambda models: not models)  # of kind given alone
    freeze_backbone: Literal[True]
    diversity: Annotated[float, Field(ge=0, le=0)]  # of kind lora alone


class HeadEnsemble(Ensemble):
    """Heads on one trunk: the Bayesian reward model ensemble (BRME)."""

    kind: Literal["heads"]
    freeze_backbone: bool  # type: ignore[assignment]


class LoraEnsemble(Ensemble):
    """Adapters beside one trunk, each with a head."""

    kind: Literal["lora"]
    diversity: NonNegative


class MemberEnsemble(Ensemble):
    """Reward models of their own, side by side."""

    kind: Literal["members"]


class WarmEnsemble(Ensemble):
    """Reward models of their own, of which the weights are averaged."""

    kind: Literal["warm"]


class GivenEnsemble(Ensemble):
    """Reward models that people have, as they are, and heads beside them that are members on the reward's trunk."""

    kind: Literal["given"]
    heads: Annotated[int, Field(ge=0)]
    models: Annotated[list[Given], Field(min_length=1)]


AnyEnsemble = Annotated[
    HeadEnsemble | LoraEnsemble | MemberEnsemble | WarmEnsemble | GivenEnsemble, Discriminator("kind")
]


class Ppo(Section):
    """Proximal policy optimisation."""

    updates: PositiveInt
    prompts_per_update: PositiveInt
    responses_per_prompt: PositiveInt
    minibatch_size: PositiveInt
    microbatch_tokens: PositiveInt
    epochs: PositiveInt
    trains: Literal["layers", "lora", "full"]
    train_layers: PositiveInt
    lora_rank: PositiveInt
    lora_targets: list[str] | None = None
    learning_rate: PositiveFloat
    kl_weight: NonNegative
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_in: Literal["reward", "loss"]
    kl_target: PositiveFloat | None
    kl_horizon: PositiveFloat
    max_kl: PositiveFloat | None
    estimator: Literal["gae", "rloo", "grpo", "reinforce++"]
    gae_lambda: Share
    clip_ratio: PositiveFloat
    clip_value: PositiveFloat
    value_weight: NonNegative
    max_grad_norm: PositiveFloat
    missing_eos_score: float
    max_step_kl: PositiveFloat

    @property
    def responses_per_update(self) -> int:
        """Responses in one rollout, over all processes."""
        return self.prompts_per_update * self.responses_per_prompt


class Health(Section):
    """When a policy's training counts as gone wrong, and what is then tried (rrlhf/policy/health.py)."""

    checkpoint_every: PositiveInt
    rollbacks: Annotated[int, Field(ge=0)]
    rollback_learning_rate: Annotated[float, Field(gt=0, le=1)]
    patience: PositiveInt
    max_skipped_steps: Annotated[int, Field(ge=0)]
    max_token_kl: PositiveFloat
    min_entropy: Share
    max_unfinished: Share


class Dpo(Section):
    """Direct preference optimisation."""

    loss: Literal["sigmoid", "ipo"]
    beta: PositiveFloat
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    epochs: PositiveInt
    pairs_per_batch: PositiveInt
    microbatch_size: PositiveInt
    train_layers: PositiveInt | None
    learning_rate: PositiveFloat
    max_grad_norm: PositiveFloat
    keep_states: bool


class BestOfN(Section):
    """Choosing the best of several responses."""

    samples: PositiveInt | None
    batch_size: PositiveInt
    missing_eos_score: float


def _arm_name(text: str) -> str:
    if not re.fullmatch(r"(?!v\d+$)[a-z0-9][a-z0-9_-]{0,39}", text) or text in NOT_ARMS:
        raise ValueError(
            "use lower-case letters, digits, - and _, which MLflow takes as an alias; not v1, v2 and so on, "
            + ", ".join(NOT_ARMS)
        )
    return text


def _import_path(text: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text):
        raise ValueError("write module:function, for example my_rules:no_lists")
    return text


class Arm(Section):
    """One policy of the comparison: how it is made, and its seed."""

    method: Literal["ppo", "dpo", "best_of_n"]
    seed: int  # that of the run where none is given

    @model_serializer(mode="wrap")
    def _without_defaults(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is as usual: it belongs to no key."""
        fields: dict[str, Any] = dumped(self)
        return {name: value for name, value in fields.items() if value != type(self).model_fields[name].default}


class DpoArm(Arm):
    """A policy that learns from the preferences themselves and sees no reward."""

    method: Literal["dpo"]


class PaidArm(Arm):
    """A policy that is paid, by a reward whose settings are fields of the class that `_by_reward` makes for it."""

    reward: str
    functions: dict[
        Annotated[str, AfterValidator(_import_path)], Finite
    ] = {}  # what one unit of each adds to the reward

    @property
    def settings(self) -> dict[str, float]:
        """The settings of its reward, by name."""
        return {name: getattr(self, name) for name in REWARDS[self.reward]}


class PpoArm(PaidArm):
    """A policy trained by PPO."""

    method: Literal["ppo"] = "ppo"


class BestOfNArm(PaidArm):
    """The best of n responses of the SFT model."""

    method: Literal["best_of_n"]
    n: PositiveInt


def _by_reward(method: type[PaidArm]) -> Any:
    """Return the union of a method's arms: a class for all rewards that have the same settings."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for reward, settings in REWARDS.items():
        alike.setdefault(settings, []).append(reward)
    arms = []
    for settings, rewards in alike.items():
        fields: dict[str, Any] = {name: (REWARD_SETTINGS[name], ...) for name in settings}
        fields["reward"] = (Literal[tuple(rewards)], ...)
        arms.append(create_model(method.__name__, __base__=method, **fields))
    return Annotated[reduce(or_, arms), Discriminator("reward")]


def method(arm: Any) -> str | None:
    """Return the method of an arm, as it is written or read."""
    return arm.get("method", "ppo") if isinstance(arm, dict) else getattr(arm, "method", None)


if TYPE_CHECKING:
    AnyArm = Arm
else:
    AnyArm = Annotated[
        Annotated[_by_reward(PpoArm), Tag("ppo")]
        | Annotated[DpoArm, Tag("dpo")]
        | Annotated[_by_reward(BestOfNArm), Tag("best_of_n")],
        Discriminator(method),
    ]


def typed_arm(**settings: Any) -> Arm:
    """Return an arm of the class that its method and reward name."""
    return TypeAdapter(AnyArm).validate_python(settings)


def _variable(text: str) -> str:
    if not VARIABLE.search(text):
        raise ValueError(
            "name an environment variable as those of secrets are: ..._KEY, ..._TOKEN; the key stays in it"
        )
    return text


def _http_address(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@:]+(:\d+)?(/[^\s?#]*)?", text):
        raise ValueError("write an address such as https://api.openai.com/v1, below which chat/completions lies")
    return text.rstrip("/")


class ChatJudge(Section):
    """A judge that is asked which of two answers is better, by OpenAI's protocol (rrlhf/judging/chat.py)."""

    address: Annotated[str, AfterValidator(_http_address)]
    name: str  # of the model, as it is called there
    criteria: str = "Prefer the answer that does what was asked and is correct, clear and harmless."
    options: dict[str, JsonValue] = {"temperature": 0}  # further fields of every request
    key_variable: Annotated[str, AfterValidator(_variable)] | None = "OPENAI_API_KEY"  # null: no key is sent
    at_once: PositiveInt = 4  # requests
    max_failed: Share = 0.1  # of the comparisons; with more of them without a verdict the stage fails


def _kind_of_judge(judge: Any) -> str | None:
    known = judge if isinstance(judge, dict) else getattr(judge, "__dict__", {})
    return "chat" if "address" in known else "reward" if "base" in known else None


AnyJudge = Annotated[
    Annotated[ChatJudge, Tag("chat")] | Annotated[Given, Tag("reward")],
    Discriminator(
        _kind_of_judge,
        custom_error_type="judge",
        custom_error_message="write {address: ..., name: ...} for one that is asked, {base: ...} for a reward model",
    ),
]


class Evaluate(Section):
    """The comparison of policies."""

    samples_per_prompt: PositiveInt
    batch_size: PositiveInt
    curve_responses: PositiveInt
    samples_shown: PositiveInt
    judge: AnyJudge | None = Field(default=None, exclude_if=lambda judge: judge is None)  # the user's, beside gold


class Gates(Section):
    """What a version must show to be promoted (rrlhf/tools/gates.py); null: that gate is left out."""

    level: Annotated[float, Field(gt=0, lt=1)]
    min_win_rate: Share | None
    max_kl: NonNegative | None
    max_sigma: NonNegative | None
    max_length_drift: NonNegative | None
    max_repetition: Share | None


class Tracking(Section):
    """Where runs and models are remembered; the server comes from MLFLOW_TRACKING_URI."""

    experiment: str
    candidate: str


class Launch(Section):
    """How a training stage is started; changes nothing but rounding."""

    processes: PositiveInt
    sharding: Literal["none", "full"]
    threads: Annotated[int, Field(ge=0)]
    arms_at_once: PositiveInt
    runner: Literal["threads", "dask", "ray"]


class Limits(Section):
    """What ends a run that goes on well otherwise; part of no key."""

    max_cut: Share


class Signatures(Section):
    """Key files for signing what is made and verifying what is read (rrlhf/pipeline/signatures.py); null: not done."""

    private_key: str | None
    public_key: str | None


class Params(Section):
    """All settings of one run."""

    seed: int
    model: Model
    prepare: Prepare
    gold: Gold
    sft: Sft
    reward: Reward
    ensemble: AnyEnsemble
    ppo: Ppo
    health: Health
    dpo: Dpo
    best_of_n: BestOfN
    arms: Annotated[dict[Annotated[str, AfterValidator(_arm_name)], AnyArm], Field(min_length=1)]
    evaluate: Evaluate
    gates: Gates
    tracking: Tracking
    launch: Launch
    limits: Limits
    signatures: Signatures

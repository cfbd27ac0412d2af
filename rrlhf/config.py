"""All settings as frozen, typed sections: what may stand in params.yaml (rrlhf/pipeline/params.py reads it)."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

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

RewardName = Literal[
    "single",
    "robust",
    "batch_robust",
    "nominal",
    "worst",
    "mean",
    "median",
    "uwo",
    "mean_minus_std",
    "lower_bound",
    "entropic",
    "gaussian_entropic",
    "constant",
    "ellipsoid",
]
REWARD_SETTINGS = ("nominal_weight", "credible", "uncertainty_weight", "temperature")  # of an arm; each reward has some


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


class HeadTraining(Section):
    """What every reward head's training needs; from `margin` on, of the Bradley-Terry loss alone."""

    epochs: PositiveInt
    pairs_per_batch: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegative
    margin: NonNegative
    centring: NonNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    dro_temperature: PositiveFloat | None
    dro_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class TrunkTraining(Section):
    """The layers below the reward heads: where they come from, and how they train."""

    base: str | None
    revision: str | None
    prompt_tokens: PositiveInt | None
    response_tokens: PositiveInt | None
    layer: PositiveInt
    batch_size: PositiveInt
    trunk: Literal["frozen", "lora", "full"]
    train_layers: PositiveInt
    lora_rank: PositiveInt
    trunk_epochs: PositiveInt
    trunk_pairs_per_batch: PositiveInt
    trunk_learning_rate: PositiveFloat
    trunk_max_grad_norm: PositiveFloat

    def language_model(self, shared: Model) -> Model:
        """Return the settings of the language model that these layers are of; shared: the one of all stages."""
        given = {"prompt_tokens": self.prompt_tokens, "response_tokens": self.response_tokens}
        own = {"base": self.base, "revision": self.revision} if self.base is not None else {}
        return shared.model_copy(update=own | {name: limit for name, limit in given.items() if limit is not None})


class Reward(HeadTraining, TrunkTraining):
    """The single reward head and the trunk features that all heads share."""


class Member(HeadTraining):
    """One head of an ensemble; a member that is a reward model of its own knows no more than this."""

    hidden: Annotated[int, Field(ge=0)]
    loss: Literal["reparam_mse", "gaussian_nll", "bradley_terry"]
    target: Literal["stage1_reward", "margin"]
    head_data: Literal["bootstrap", "all"]
    sigma: Literal["posterior", "learned"]
    sigma_floor: PositiveFloat


class Ensemble(Member):
    """The ensemble of reward models; heads on one trunk are the Bayesian reward model ensemble (BRME)."""

    kind: Literal["heads", "members", "lora", "warm"]
    heads: PositiveInt
    freeze_backbone: bool
    diversity: NonNegative


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
    train_layers: PositiveInt
    learning_rate: PositiveFloat
    max_grad_norm: PositiveFloat
    keep_states: bool


class BestOfN(Section):
    """Choosing the best of several responses."""

    samples: PositiveInt | None
    batch_size: PositiveInt
    missing_eos_score: float


Method = Literal["ppo", "dpo", "best_of_n"]


class Arm(Section):
    """One policy of the comparison: how it is made, the reward that it sees, and its seed."""

    method: Method = "ppo"
    reward: RewardName | None = None  # null: it sees none (dpo)
    n: PositiveInt | None = None  # best_of_n: responses to choose from
    nominal_weight: Share | None = None  # robust, batch_robust: share of the most confident head's reward
    credible: NonNegative | None = None  # robust, batch_robust, worst, ellipsoid: how far the worst case goes, in sigma
    uncertainty_weight: NonNegative | None = None  # uwo, mean_minus_std, lower_bound: what disagreement costs
    temperature: PositiveFloat | None = None  # entropic, gaussian_entropic: low means careful
    functions: dict[str, Finite] = {}  # by "module:function": what one unit of its value adds to the reward
    seed: int  # that of the run where none is given

    @property
    def settings(self) -> dict[str, float]:
        """The settings of its reward, by name."""
        given = {name: getattr(self, name) for name in REWARD_SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    @model_serializer(mode="wrap")
    def _without_unused(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not set, and the usual method: it belongs to no key."""
        fields: dict[str, Any] = dumped(self)
        if not self.functions:
            del fields["functions"]
        if self.method == "ppo":
            del fields["method"]
        return {name: value for name, value in fields.items() if value is not None}


class Evaluate(Section):
    """The comparison of policies."""

    samples_per_prompt: PositiveInt
    batch_size: PositiveInt
    curve_responses: PositiveInt
    samples_shown: PositiveInt


class Gates(Section):
    """What a version must show to be promoted (rrlhf/tools/promotion/gates.py); null: that gate is left out."""

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
    threads: Annotated[int, Field(ge=0)]
    arms_at_once: PositiveInt


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
    ensemble: Ensemble
    ppo: Ppo
    health: Health
    dpo: Dpo
    best_of_n: BestOfN
    arms: dict[str, Arm]
    evaluate: Evaluate
    gates: Gates
    tracking: Tracking
    launch: Launch
    limits: Limits
    signatures: Signatures

"""A policy while it trains: which weights move, the reference that it is compared with, and its whole state.

Three ways to train, `ppo.trains`. `layers`: the top layers; below them policy and reference are one, so a rollout's
pass through the frozen layers serves both. `lora`: low-rank adapters in the top layers; without them the same modules
are the reference. `full`: everything, embeddings included, with a reference of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from rrlhf.advantages import has_critic
from rrlhf.config import Ppo
from rrlhf.models.adapters import adapt, without_adapters
from rrlhf.models.load import LanguageModel
from rrlhf.models.rollout import Samples, sample
from rrlhf.models.top import PolicyTop, Read, first_trained
from rrlhf.policy.checkpoint import State, Trained, random_states, set_random_states
from rrlhf.policy.health import Event
from rrlhf.policy.reference import frozen
from rrlhf.policy.reward_functions import RewardFunction
from rrlhf.rewards.scoring import RewardModel, load_for_policy, shared_layer
from rrlhf.types import Metrics


class Sampled(NamedTuple):
    """One rollout response, kept so that other judges can read it later."""

    update: int
    prompt: int  # row of the ppo table
    response: str
    finished: bool
    kl: float  # log(pi / pi_ref) of the response, nats
    proxy: float
    heads: list[float]
    sigma: float  # mean standard deviation of the heads' scores


@dataclass
class Course:
    """How far a training has come, and all that it has told."""

    update: int = 0  # updates that count; a rollback takes some of them back
    rows: list[Metrics] = field(default_factory=list)  # one for each rollout, those taken back included
    kept: list[Sampled] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)  # the rows after which there was one

    @property
    def step(self) -> int:
        """Rollouts so far."""
        return len(self.rows)


@dataclass
class Learner:
    """All that changes while a policy trains, and the frozen models that it is compared with."""

    engine: Accelerator
    language: LanguageModel
    top: PolicyTop
    reference: Callable[..., Read]  # as `PolicyTop.read`
    policy: nn.Module  # `top`, wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    single: RewardModel
    ensemble: RewardModel
    reward_layer: int | None  # whose states the reward heads read; None: no reward model reads the policy's pass
    kl_weight: float  # beta as it stands; moves where ppo.kl_target is set
    generator: torch.Generator  # sampling
    shuffle: torch.Generator  # order of minibatches
    functions: Sequence[RewardFunction]  # of the arm

    @property
    def trained(self) -> Trained:
        """What its optimizer steps change."""
        return Trained(self.top, self.optimizer, self.schedule)

    @property
    def boundary(self) -> int | None:
        """Layers below it are frozen; None: everything trains."""
        return self.top.first

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Frozen layers whose entering states sampling leaves: the boundary and, below it, the reward heads' layer."""
        wanted = {self.boundary, self.reward_layer if self.shares_trunk else None}
        return tuple(layer for layer in wanted if layer is not None)

    @property
    def shares_trunk(self) -> bool:
        """Whether the reward heads' layer lies in the frozen part; else the reference's pass gives its states."""
        return self.reward_layer is not None and self.boundary is not None and self.reward_layer <= self.boundary

    def sample(self, prompts: list[list[int]], response_tokens: int) -> Samples:
        """Sample from the policy as it is."""
        return sample(self.language, prompts, response_tokens, self.generator, self.kept_layers)


def prepare_learner(
    engine: Accelerator,
    language: LanguageModel,
    ppo: Ppo,
    seed: int,
    reward: Path,
    ensemble: Path,
    functions: Sequence[RewardFunction] = (),
) -> Learner:
    """Freeze what does not train and build the optimizer."""
    single, several = (load_for_policy(folder, engine.device) for folder in (reward, ensemble))
    language.network.requires_grad_(False).to(engine.device)
    top, reference = _trainable(language, ppo)
    top.value.requires_grad_(has_critic(ppo))
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=ppo.learning_rate, eps=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=ppo.updates)
    policy, optimizer = engine.prepare(top, optimizer)
    own = seed * 1000 + engine.process_index
    return Learner(
        engine=engine,
        language=language,
        top=top,
        reference=reference,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        single=single,
        ensemble=several,
        reward_layer=shared_layer((single, several), reward),
        kl_weight=ppo.kl_weight,
        generator=torch.Generator(engine.device).manual_seed(own),
        shuffle=torch.Generator().manual_seed(own),
        functions=functions,
    )


def _trainable(language: LanguageModel, ppo: Ppo) -> tuple[PolicyTop, Callable[..., Read]]:
    """Let the weights of `ppo.trains` move; return what trains and its reference."""
    if ppo.trains == "full":
        top = PolicyTop(language, None)
        return top, _reference(top, language)
    first = first_trained(language, ppo.train_layers, "ppo.train_layers")
    if ppo.trains == "lora":
        adapt(language.network, first, language.layers, copies=1, rank=ppo.lora_rank)
        top = PolicyTop(language, first)
        return top, _without_adapters(top, language)
    top = PolicyTop(language, first)
    reference = _reference(top, language)
    top.unembed.requires_grad_(False)  # the largest matrix by far, in many models the frozen embeddings as well
    return top, reference


def _reference(top: PolicyTop, language: LanguageModel) -> Callable[..., Read]:
    """Return the policy as it is before the first step, and let its weights move."""
    read = frozen(top, language)
    top.requires_grad_(True)
    return read


def _without_adapters(top: PolicyTop, language: LanguageModel) -> Callable[..., Read]:
    """Return the reference that the policy's own modules are without their adapters."""

    def read(*arguments: Any, **options: Any) -> Read:
        with without_adapters(language.network):
            return top.read(*arguments, **options)

    return read


def clip_gradients(learner: Learner, max_norm: float) -> float:
    """Have the next step use gradients whose norm is at most `max_norm`; return the norm that they have.

    In one process the fused optimizer divides them as it goes, which spares a walk through all of them.
    """
    if learner.engine.num_processes > 1:
        return float(learner.engine.clip_grad_norm_(learner.policy.parameters(), max_norm))
    gradients = [weight.grad for weight in learner.top.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    inner: Any = learner.optimizer
    inner.optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)
    return float(norm)


def snapshot(learner: Learner, course: Course) -> State:
    """Return all that a learner needs to go on."""
    return State(
        shared=learner.trained.tensors(),
        own=random_states(generator=learner.generator, shuffle=learner.shuffle),
        notes={**learner.trained.notes(), "kl_weight": learner.kl_weight, "course": vars(course)},
    )


def restore(learner: Learner, state: State) -> None:
    """Put the weights, the optimizer, its schedule and the KL weight where they were; randomness goes on as it is."""
    learner.trained.put_back(state)
    learner.kl_weight = state.notes["kl_weight"]


def resume(learner: Learner, state: State | None) -> Course:
    """Put the learner where a state was, randomness included; return how far that was."""
    if state is None:
        return Course()
    restore(learner, state)
    set_random_states(state.own, generator=learner.generator, shuffle=learner.shuffle)
    told = state.notes["course"]
    kept, events = [Sampled(*row) for row in told["kept"]], [Event(*row) for row in told["events"]]
    return Course(**told | {"kept": kept, "events": events})

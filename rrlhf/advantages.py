"""Which estimator turns a rollout's token rewards into advantages, with statistics over all processes."""

from typing import NamedTuple

from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Ppo
from rrlhf.returns import gae, grpo, rewards_to_go, rloo, whiten


class Estimate(NamedTuple):
    """What a rollout's tokens were worth, [batch, response tokens] each."""

    advantages: Tensor  # as the policy loss takes them
    returns: Tensor  # what the value function learns, in units of reward; without a critic, the return itself


def estimate(engine: Accelerator, ppo: Ppo, rewards: Tensor, values: Tensor, mask: Tensor) -> Estimate:
    """Return the advantages of `ppo.estimator`; only `gae` reads the values.

    `gae` and `reinforce++` are whitened over the batch of all processes; `rloo` and `grpo` compare the responses to
    one prompt, which one process holds, and stay as they are.
    """
    match ppo.estimator:
        case "gae":
            advantages = gae(rewards, values, mask, ppo.gae_lambda)
            return Estimate(_whiten_over_processes(engine, advantages, mask), advantages + values)
        case "reinforce++":
            to_go = rewards_to_go(rewards, mask)
            return Estimate(_whiten_over_processes(engine, to_go, mask), to_go)
        case "rloo":
            return Estimate(rloo(rewards, mask, ppo.responses_per_prompt), rewards_to_go(rewards, mask))
        case "grpo":
            return Estimate(grpo(rewards, mask, ppo.responses_per_prompt), rewards_to_go(rewards, mask))


def has_critic(ppo: Ppo) -> bool:
    """Whether a value function trains."""
    return ppo.estimator == "gae"


def _whiten_over_processes(engine: Accelerator, values: Tensor, mask: Tensor) -> Tensor:
    """Whiten with the statistics of all processes' tokens; return this process's rows."""
    rows = slice(engine.process_index * len(values), (engine.process_index + 1) * len(values))
    return whiten(engine.gather(values), engine.gather(mask))[rows]

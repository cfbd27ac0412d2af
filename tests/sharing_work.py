"""Trains by every method in the processes of this launch, and writes what came out: what test_processes.py compares."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rrlhf.config import Model, Ppo, typed_arm
from rrlhf.environment import spare_collector
from rrlhf.models.load import load_base
from rrlhf.models.processes import accelerator
from rrlhf.models.shards import loading_device, reads_weights, whole
from rrlhf.pipeline.params import load_params
from rrlhf.policy.answers import Answer, Answers
from rrlhf.policy.learner import prepare_learner, top_layers, with_optimizer
from rrlhf.policy.reward import Prompts, arm_reward, load_reward_models
from rrlhf.stages import dpo, ppo, sft

PROMPTS = Prompts([[3, 9, 12], [4, 7, 8, 20], [5, 30, 31], [40, 41]])
ANSWERS = [Answer((3, 9, 12 + n, 13, *range(20, 20 + n % 4)), 3) for n in range(16)]
BATCHES = [[*range(8)], [*range(3, 11)]]
CASES = {  # of PPO; a whole rollout is one minibatch, for each process has an order of its own
    "gae": {"estimator": "gae", "trains": "full"},
    "rloo": {"estimator": "rloo", "responses_per_prompt": 2},
    "grpo": {"estimator": "grpo", "responses_per_prompt": 2, "trains": "lora"},
    "reinforce++": {"estimator": "reinforce++", "max_step_kl": 1e-9},  # ends every update early
    "tied": {"trains": "full", "microbatch_tokens": 20},  # parts of which processes have more or fewer
    "tied below": {"trains": "lora"},
    "whole": {"trains": "full", "microbatch_tokens": 20},
    "whole above": {"trains": "layers"},
}


def held(module):
    """Return how many numbers of its weights this process has."""
    weights = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in module.parameters())
    return sum(map(torch.numel, weights))


def train_all(model, settings, rewards, bases, out):
    """Write the weights of every method, and what its training told; bases: other ones, of cases named after them."""
    torch.set_num_threads(1)
    engine, told = accelerator(model), {}

    def note(name, top, rows, responses):
        everyone = sorted(map(tuple, gather_object(responses)))
        trained = {each: whole(weight.detach()) for each, weight in top.named_parameters() if weight.requires_grad}
        if engine.is_main_process:
            save_file({each: weight.contiguous().clone() for each, weight in trained.items()}, out / name)
            told[name] = {
                "rows": rows,
                "responses": everyone,
                "held": held(top) / sum(map(torch.numel, top.parameters())),
            }

    for name, changed in CASES.items():
        torch.manual_seed(0)
        ours = settings.model_copy(update=changed)
        ours = ours.model_copy(update={"minibatch_size": ours.responses_per_update})
        models = load_reward_models(*rewards, engine.device)
        base = model.model_copy(update={"base": bases.get(name.split()[0], model.base)})
        language = load_base(base, weights=reads_weights(engine))
        language.network.generation_config.eos_token_id = [1, *range(30, 60)]  # most responses end, and have a score
        learner = prepare_learner(engine, language, models, model=model, ppo=ours, seed=0)
        arm = typed_arm(reward="batch_robust", nominal_weight=0.4, credible=2.0, seed=0)
        rows, responses = zip(*ppo.train(learner, PROMPTS, arm_reward(arm, engine)), strict=True)
        said = [(one.update, one.prompt, one.response) for some in responses for one in some]
        note(name, learner.top, rows, said)

    params = load_params(Path(__file__).parents[1], "tiny")
    for name, microbatch in (("sft", 2), ("dpo", 3)):
        torch.manual_seed(0)
        language = load_base(model)
        top = top_layers(language, loading_device(engine), 2)
        trained = with_optimizer(engine, language, top, 1e-3, 2)
        if name == "sft":
            ours = params.sft.model_copy(update={"microbatch_size": microbatch})
            rows = [*sft.train(Answers(trained, ANSWERS, model), BATCHES, ours)]
        else:
            ours = params.dpo.model_copy(update={"microbatch_size": microbatch, "epochs": 1})
            pairs = dpo.prepare_pairs(trained, [*pairwise(ANSWERS)], model, ours)
            rows = [*dpo.train(pairs, pairs, BATCHES, ours)]
        note(name, top, rows, [])
    if engine.is_main_process:
        (out / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    spare_collector()
    job = json.loads(Path(sys.argv[1]).read_text())
    train_all(Model(**job["model"]), Ppo(**job["ppo"]), [*map(Path, job["rewards"])], job["bases"], Path(job["out"]))

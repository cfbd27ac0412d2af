"""The main path: preferences in, a comparison of policies out."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from rrlhf.execution.run import make, running
from rrlhf.pipeline.params import run_name


def called() -> str:
    """Return the name of the flow run that is beginning."""
    given = flow_run.parameters
    return run_name(given["profile"], given["overrides"])


# Prefect keeps no results (persist_result): the store has them, and a record that names its own reader would be run.
# Only what does not depend on each other runs at the same time, launch.arms_at_once of it, or on a cluster.
@flow(
    name="reward-robust-rlhf",
    flow_run_name=called,
    persist_result=False,
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # type: ignore[arg-type]
)
def pipeline(
    profile: str = "default",
    overrides: dict[str, Any] | None = None,
    part: dict[str, list[str]] | None = None,
    take_aliases: bool = False,
) -> dict[str, Any]:
    """Prepare data, train SFT and reward models, make one policy per arm, and compare the policies.

    profile: params.yaml ("default") or a file of profiles/. overrides: by dotted name, {"ppo.kl_weight": 0.05}.
    part: of the graph, by names of stages under "start", "until", "only", "force" (rrlhf/pipeline/decide.py).
    take_aliases: candidate and the arms' aliases go to what a run with overrides makes, too.
    Returns what ran, the folder of every result, and the report (None where a part has no comparison).
    """
    with running(profile, overrides, part, take_aliases) as run:
        make("prepare", run)  # demonstrations, preferences and prompts, split by prompt
        make("sft", run)  # policy_0, where every policy starts
        make("given", run)  # reward models that people have, where some are used as they are
        make("reward", run)  # the single head: the proxy
        make("member", run)  # reward models of their own, where the ensemble is made of such
        make("ensemble", run)  # K heads with a posterior
        make("arm", run)  # a policy for each way to make one: PPO, DPO, best of n
        make("evaluate", run)  # gold, the second judge and the reward models read every policy
    return run.summary

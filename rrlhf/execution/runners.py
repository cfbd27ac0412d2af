"""Where the nodes that stand side by side are made: in threads of this process, or by a cluster's workers."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.futures import PrefectFuture, wait
from prefect.task_runners import TaskRunner

from rrlhf.config import Launch
from rrlhf.stopping import STOPPING, check_stop, stop_between_steps


@contextmanager
def runner_of(launch: Launch) -> Iterator[TaskRunner[Any] | None]:
    """Yield Prefect's runner for a cluster of Dask or Ray; None where the flow's own threads do.

    The cluster is that of DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, or else processes of this machine while the run lasts.
    """
    if launch.runner == "threads":
        yield None
        return
    at_once = launch.arms_at_once
    if launch.runner == "dask":
        from prefect_dask import DaskTaskRunner

        logging.getLogger("distributed").setLevel(logging.ERROR)
        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        workers = None if address else {"n_workers": at_once, "threads_per_worker": 1}
        runner = DaskTaskRunner(address=address, cluster_kwargs=workers)
    else:
        from prefect_ray import RayTaskRunner

        address = os.environ.get("RAY_ADDRESS")
        runner = RayTaskRunner(address=address, init_kwargs={} if address else {"num_cpus": at_once})
    with runner:
        stop_between_steps(STOPPING)  # again: Ray has a handler of SIGTERM of its own
        yield runner


def waited(futures: list[PrefectFuture[Any]], runner: TaskRunner[Any] | None) -> None:
    """Wait for all. Threads end by themselves when the run is asked to stop; a cluster's workers are left."""
    while runner and wait(futures, timeout=1.0).not_done:
        check_stop()
    wait(futures)

"""Where the nodes that stand side by side are made: in threads of this process, or by the workers of a Dask cluster."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.futures import PrefectFuture, wait
from prefect.task_runners import TaskRunner

from rrlhf.config import Launch
from rrlhf.located import UsageError
from rrlhf.stopping import check_stop


@contextmanager
def runner_of(launch: Launch) -> Iterator[TaskRunner[Any] | None]:
    """Yield Prefect's runner for a Dask cluster; None where the flow's own threads do.

    The cluster is that of DASK_SCHEDULER_ADDRESS, or else one of processes on this machine, for the length of the run.
    """
    if launch.runner == "threads":
        yield None
        return
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise UsageError("launch.runner: dask needs prefect-dask; pip install 'rrlhf[dask]'") from None
    logging.getLogger("distributed").setLevel(logging.ERROR)
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    workers = None if address else {"n_workers": launch.arms_at_once, "threads_per_worker": 1}
    with DaskTaskRunner(address=address, cluster_kwargs=workers) as runner:
        yield runner


def waited(futures: list[PrefectFuture[Any]], runner: TaskRunner[Any] | None) -> None:
    """Wait for all. Threads end by themselves when the run is asked to stop; a cluster's workers are left."""
    while runner and wait(futures, timeout=1.0).not_done:
        check_stop()
    wait(futures)

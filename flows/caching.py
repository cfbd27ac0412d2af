"""Prefect's view of our keys: a task is Cached when a result with the same key was recorded before.

The record is only a pointer: whether the artifact exists and is unchanged is checked before every use
(flows/pipeline.py), and results are JSON, never pickle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext


@dataclass
class ByKey(CachePolicy):
    """Takes a task's argument `key`, the sha256 of a key document, as its cache key."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Return the key itself."""
        return str(inputs["key"])

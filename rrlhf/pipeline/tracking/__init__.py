"""MLflow, the memory: every flow and stage is a run, every trained model a registered version, linked to its inputs.

Training never waits for this package, and registering never trains: a version is looked up by the key and the digest
of its artifact, so a new or emptied server is filled again from the artifacts. Only this package imports mlflow, and
only when something is asked of it, because that import takes seconds.
"""

from rrlhf.pipeline.tracking.models import tag_fault
from rrlhf.pipeline.tracking.server import AwayError, TrackingError, mlflow_pages, version_page
from rrlhf.pipeline.tracking.tracker import Registered, Tracker, Version

__all__ = [
    "AwayError",
    "Registered",
    "Tracker",
    "TrackingError",
    "Version",
    "mlflow_pages",
    "tag_fault",
    "version_page",
]

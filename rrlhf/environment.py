"""The process environment that every command and every worker starts with; what the user has set wins."""

import atexit
import contextlib
import ctypes
import errno
import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rrlhf.located import MendableError, UsageError
from rrlhf.redact import redact_output

QUIET = {
    "DO_NOT_TRACK": "true",  # mlflow accepts only this word
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # a bar for every file that is loaded or saved
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default of 20 is short for two busy cores
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # its defaults: after 7 and after 90 days
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "WARNING",  # one line a task is enough
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # looking for some takes as long as a whole plan
    "TOKENIZERS_PARALLELISM": "false",
}


SHARDING = "RRLHF_SHARDING"  # what the processes of a launch are told: `launch.sharding`

FULL = 2**20  # bytes: with less than that left on the disk, this is why something failed
ROOM = 32 * 2**20  # bytes: the databases of Prefect and MLflow and the results of the tiny profile take ten million


class FullError(MendableError):
    """There is no room on the disk."""

    def __init__(self, path: Path, needed: int | None = None) -> None:
        free = free_bytes(path)
        needs = f"{ROOM if needed is None else needed:,} bytes or more are needed"
        if needed is None and free >= ROOM:
            needs = "what is written next takes more, or lies on another disk"
        super().__init__(
            f"{path}: no room on the disk: {needs}, {free:,} are free. Make room and give the same command again: what "
            "is finished stays"
        )


def find_root(start: Path) -> Path:
    """Return the nearest folder, from `start` upwards, that holds params.yaml."""
    for folder in (start, *start.parents):
        if (folder / "params.yaml").is_file():
            return folder
    raise UsageError(f"no params.yaml in {start} or above: run rrlhf in a project's folder; `rrlhf init` makes one")


def set_environment(root: Path) -> None:
    """Turn telemetry off, keep Prefect's state inside the project, work in its folder, and tell no secret."""
    redact_output()
    spare_collector()
    os.chdir(root)  # paths in params.yaml are relative to it
    home = root / ".rrlhf" / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    for name, value in (QUIET | {"PREFECT_HOME": str(home)}).items():
        os.environ.setdefault(name, value)
    if (prefect := find_spec("prefect")) and prefect.origin:  # a logging.yml in its home could name code to be run
        own = Path(prefect.origin).with_name("logging") / "logging.yml"
        os.environ.setdefault("PREFECT_LOGGING_SETTINGS_PATH", str(own))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log needs lines (rrlhf/progress.py), not a bar that redraws
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):  # DVC and Prefect start `python` from it
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])


def free_bytes(path: Path) -> int:
    """Return the room on the disk of a path, or of the nearest folder above that exists."""
    here = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(here).free


def check_room(root: Path, results: int = 0) -> None:
    """Raise FullError when a run would not find the room that it needs: each of its parts would fail in its own way.

    results: bytes that it will write, as far as that is known.
    """
    if free_bytes(root) < ROOM + results:
        raise FullError(root, ROOM + results)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or what a person may use of it, is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def telling_full_disk(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk makes of work in a folder into FullError: libraries have many errors for it."""
    try:
        yield
    except FullError:
        raise
    except Exception as error:
        if is_full(error) or "No space left on device" in str(error) or free_bytes(folder) < FULL:
            raise FullError(folder) from None
        raise


def end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is killed; otherwise it would go on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def spare_collector() -> None:
    """Have Python seldom look for cycles among the half million objects that libraries keep, and not at the end."""
    gc.set_threshold(700, 10, 1000)  # young objects as often as by default
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def releasing_memory() -> Iterator[None]:
    """Let go of what nothing refers to, and of its memory, after a training stage; what was there before it stays."""
    gc.freeze()  # it is not looked through, which takes half a second
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        give_back_memory()


def give_back_memory() -> None:
    """Give memory that is free back to the system: glibc alone would keep gigabytes."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

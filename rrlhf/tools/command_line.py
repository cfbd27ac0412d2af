"""What the commands share: options, exit codes, and errors as people should see them."""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rrlhf import stopping
from rrlhf.environment import FULL, FullError, free_bytes, is_full
from rrlhf.located import MendableError
from rrlhf.pipeline.params import load_params, parse_override
from rrlhf.redact import visible
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.types import Json

FAILED, USAGE, VERIFICATION_FAILED, SIGNALLED = 1, 2, 3, 128

Profile = Annotated[str, typer.Option(help="`default` is params.yaml; others are files in profiles/.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one parameter for this run; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Model = Annotated[
    str, typer.Argument(help="rrlhf-policy@candidate, rrlhf-policy/3, the start of a digest, or a folder.")
]


def overrides(set_: list[str] | None) -> dict[str, Json]:
    """Parse --set options; whether they fit the settings is told when those are read."""
    return dict(parse_override(text) for text in set_ or [])


def opened(profile: str, set_: list[str] | None = None) -> Lookup:
    """Return what there is in this folder's project, by a profile's settings with --set options."""
    return Lookup(Path.cwd(), profile, load_params(Path.cwd(), profile, overrides(set_)))


@contextmanager
def mending() -> Iterator[None]:
    """Turn errors that people can mend into one message and an exit code; the rest keep their traceback."""
    try:
        yield
    except MendableError as error:
        end(error.exit_code, str(error))
    except ValueError as error:
        end(FAILED, str(error))
    except BrokenPipeError:  # of `rrlhf plan | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        raise SystemExit(SIGNALLED + signal.SIGPIPE) from None
    except OSError as error:
        end(FAILED, os_error(error))
    except KeyboardInterrupt:
        end(
            SIGNALLED + stopping.signalled,
            "interrupted; finished stages are kept, and the same command goes on from there",
        )
    except Exception:
        if free_bytes(Path.cwd()) < FULL:  # a library's error for it could be any
            end(FAILED, str(FullError(Path.cwd())))
        raise


def os_error(error: OSError) -> str:
    """Say what the system refused, where, and what to do."""
    path = Path(error.filename) if isinstance(error.filename, str) else None
    if is_full(error):
        return str(FullError(path or min((Path.cwd(), Path(tempfile.gettempdir())), key=free_bytes)))
    said = f"{path}: {error.strerror}" if path else f"{type(error).__name__}: {error}"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} and path and path.is_relative_to(Path.cwd()):
        return f"{said}. Data, results and notes are kept in the project's folder, so it has to be writable"
    return said


def end(code: int, message: str) -> NoReturn:
    """Say why the command ends, and end it."""
    print(visible(message), file=sys.stderr)
    raise SystemExit(code)

"""The `rrlhf` command. Heavy libraries are imported inside the commands that need them."""

import inspect
import io
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.environment import find_root, set_environment
from rrlhf.pipeline.artifacts import git_commit
from rrlhf.pipeline.dvc import follow_git
from rrlhf.tools.chat import chat
from rrlhf.tools.command_line import mending
from rrlhf.tools.doctor import doctor
from rrlhf.tools.gc import gc
from rrlhf.tools.init import init
from rrlhf.tools.judging.command import evaluate_reward
from rrlhf.tools.lineage.command import audit, diff, lineage
from rrlhf.tools.promote import promote
from rrlhf.tools.push import push
from rrlhf.tools.reproduce import reproduce
from rrlhf.tools.running.command import accept, plan, relocate, report, run, status, sync, why
from rrlhf.tools.signing import keygen, sign
from rrlhf.tools.sweeps.grid import experiment, sweep
from rrlhf.tools.toy.command import toy


def serve(
    prefect_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the Prefect server and its pages.")
    ] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the MLflow server and its pages.")] = 5000,
) -> None:
    """Start Prefect's server, a work pool with a worker, and MLflow's pages on this machine, until Ctrl-C."""
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.serving import serve as start

    root = Path.cwd()
    start(root, load_params(root).tracking.experiment, prefect_port, mlflow_port)


COMMANDS: tuple[Callable[..., None], ...] = (
    *(init, run, plan, why, status, report, accept),
    *(lineage, diff, audit, promote, reproduce, push),
    *(sweep, experiment, chat, evaluate_reward, toy, serve),
    *(sync, relocate, keygen, sign, gc, doctor),
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        folder = Path(__file__).parents[1]
        commit = git_commit(folder) if (folder / ".git").exists() else None
        print(f"rrlhf {version('rrlhf')}" + (f", commit {commit} in {folder}" if commit else ""))
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, help="Tell the version, and end.")
    ] = False,
) -> None:
    """Take what comes before a command's name."""


def _paragraphs(command: Callable[..., None]) -> str:
    """Return a docstring with a line for each paragraph: the terminal's width decides where lines break."""
    return "\n\n".join(" ".join(each.split()) for each in (inspect.getdoc(command) or "").split("\n\n"))


app = typer.Typer(
    name="rrlhf",
    help="Reward-robust RLHF as a reproducible pipeline.\n\nExit codes: 0 ok, 1 failed, 2 what was typed or "
    "set is wrong, 3 a stored file was changed, or a forced stage gave another result, 4 DVC's lock cannot be had, 130 "
    "interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    callback=_options,
)
for _command in COMMANDS:
    app.command(help=_paragraphs(_command))(mending()(_command))


def main() -> None:
    """Run the command, in the project's folder where it needs one, and end with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a ± that the terminal does not have is no reason to fail
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if not first.startswith("-") and first != "init" and not {"-h", "--help"} & set(sys.argv):
        with mending():
            root = find_root(Path.cwd())
            set_environment(root)
            follow_git(root)
    app()

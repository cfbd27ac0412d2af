"""The `rrlhf` command. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec

import typer

from rrlhf.chat_command import chat
from rrlhf.environment import end_with_parent, find_root, set_environment
from rrlhf.promotion.command import promote
from rrlhf.reproduction.command import reproduce
from rrlhf.sweeps.command import sweep
from rrlhf.types import Json

P = ParamSpec("P")
FAILED, USAGE, VERIFICATION_FAILED, BUSY, SIGNALLED = 1, 2, 3, 4, 128

app = typer.Typer(
    name="rrlhf",
    help="Reward-robust RLHF as a reproducible pipeline.\n\nExit codes: 0 ok, 1 failed, 2 usage, 3 a stored file "
    "was changed, 4 busy, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Profile = Annotated[str, typer.Option(help="`default` is params.yaml; others are files in profiles/.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one parameter for this run; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Run the command in the project's folder, and end with its exit code."""
    if len(sys.argv) > 1 and not {"-h", "--help"} & set(sys.argv):
        try:
            set_environment(find_root(Path.cwd()))
        except FileNotFoundError as error:
            _end(USAGE, str(error))
    app()


@app.command()
def run(profile: Profile = "default", set_: Set = None, as_json: AsJson = False) -> None:
    """Run what is not up to date, register every model, and write the report.

    Example: rrlhf run --set ppo.kl_weight=0.05
    """
    _run(profile, _overrides(profile, set_), as_json)


@app.command()
def plan(
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="All reasons, not only the first.")] = False,
) -> None:
    """Show what a run would do, and why, without running anything."""
    from rrlhf.config import load_params
    from rrlhf.plan import Project
    from rrlhf.progress import in_words

    overrides = _overrides(profile, set_)
    with _clear_errors():
        root = Path.cwd()
        planned = Project(root, profile, load_params(root, profile, overrides)).plan()
    if as_json:
        print(json.dumps([node.as_json() for node in planned], indent=1))
        return
    width = max(len(node.node) for node in planned)
    for node in planned:
        known = node.seconds is not None and node.action != "reuse"
        took = f"  (took {in_words(node.seconds or 0)} last time)" if known else ""
        reasons = node.reasons if verbose else node.reasons[:1]
        print(f"{node.node:{width}}  {node.action:8}  {'; '.join(reasons)}{took}".rstrip())


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="rrlhf-policy@candidate, rrlhf-policy/3, or the start of a digest.")],
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Show every model and data set that a registered model came from."""
    from rrlhf.config import load_params
    from rrlhf.lineage import as_json as lineage_json
    from rrlhf.lineage import resolve, tree
    from rrlhf.tracking import Tracker

    with _clear_errors():
        root = Path.cwd()
        versions = Tracker.connect(root, load_params(root, profile).tracking.experiment).versions()
        version = resolve(model, versions)
        print(json.dumps(lineage_json(version, versions), indent=1) if as_json else tree(version, versions))


@app.command()
def report(profile: Profile = "default", set_: Set = None) -> None:
    """Write the HTML report of a finished run again, and print its path."""
    from rrlhf.config import load_params
    from rrlhf.plan import Project

    overrides = _overrides(profile, set_)
    with _clear_errors():
        root = Path.cwd()
        left = [
            node.node
            for node in Project(root, profile, load_params(root, profile, overrides)).plan()
            if node.action != "reuse"
        ]
        if left:
            _end(FAILED, f"not up to date: {', '.join(left)}; `rrlhf run` with the same options comes first")
    _run(profile, overrides, as_json=False)


@app.command("evaluate-reward")
def evaluate_reward(
    model: Annotated[
        str | None,
        typer.Argument(
            help="rrlhf-ensemble@latest, rrlhf-reward/2, the start of a digest, or an artifact's folder; "
            "left out, the profile's ensemble.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled pairs: .jsonl, .json, .csv or .parquet; left out, the model's held-out pairs."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(help="rows (prompt, chosen, rejected), hh, ultrafeedback, or rewardbench (rows with a subset)."),
    ] = "rows",
    max_rejected: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows to leave out.")] = 0.0,
    perturb: Annotated[
        int, typer.Option(min=0, help="Perturbed texts of each kind to sample for every response; 0: none.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first pairs only.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the HTML page.")] = Path("reports/reward"),
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Judge a reward model: does it rank well, is it as sure as it should be, do small changes turn its order?

    Accuracy with intervals over prompts, calibration (ECE, MCE, Brier, likelihood, temperature, reliability), what the
    heads of an ensemble know of their own mistakes, accuracy by subset, and ranking under typos, letter case,
    punctuation and the like. Nothing is trained. Paths are relative to the project's folder.

    Example: rrlhf evaluate-reward

    Example: rrlhf evaluate-reward rrlhf-ensemble@latest --data pairs.jsonl --perturb 4

    Example: rrlhf evaluate-reward rrlhf-reward/2 --data bench.parquet --format rewardbench --json
    """
    from rrlhf.config import load_params
    from rrlhf.judging.command import evaluate_reward as judged
    from rrlhf.judging.labelled import load_pairs
    from rrlhf.judging.report import show, strict, write

    overrides = _overrides(profile, set_)
    with _clear_errors():
        params = load_params(Path.cwd(), profile, overrides)
        pairs = load_pairs(data, format, max_rejected=max_rejected, limit=limit) if data else None
        report = judged(Path.cwd(), profile, params, model=model, pairs=pairs, perturb=perturb, limit=limit)
        written = write(report, out)
    if as_json:
        print(json.dumps(strict(report), indent=1))
    else:
        show(report, written[1])


@app.command()
def serve(
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server and its pages.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server and its pages.")] = 5000,
) -> None:
    """Start Prefect's server, a work pool with a worker, and MLflow's pages on this machine, until Ctrl-C."""
    from flows.serve import serve as start
    from rrlhf.config import load_params

    with _clear_errors():
        root = Path.cwd()
        start(root, load_params(root).tracking.experiment, prefect_port, mlflow_port)


@app.command()
def toy(
    seeds: Annotated[int, typer.Option(min=2, help="Independent worlds; intervals are over them.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of every policy.")] = 1000,
    beta: Annotated[float, typer.Option(min=1e-3, help="Reward per nat of KL to the reference.")] = 0.2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of the ensemble.")] = 5,
    labelled: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of each prompt's responses with preference labels.")
    ] = 0.5,
    interaction: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation of what only prompt and response together tell.")
    ] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder for toy.json, toy.png and toy.svg.")] = Path("reports", "toy"),
    as_json: AsJson = False,
) -> None:
    """Compare robust rewards on the paper's toy, where the optimum is known: 8 prompts, 8 responses.

    Example: rrlhf toy --labelled 0.25 --beta 0.1
    """
    from rich.console import Console

    from rrlhf.toy.show import table, verdict, write
    from rrlhf.toy.study import Setting, study

    setting = Setting(seeds, steps, beta, heads, labelled, interaction)
    with _clear_errors():
        found = study(setting)
        write(found, out)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    console.print(table(found))
    for sentence in verdict(found):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"\npicture: {out / 'toy.png'}", highlight=False, markup=False, soft_wrap=True)


@app.command(hidden=True)
def key(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    profile: Profile = "default",
) -> None:
    """Write the key document of a profile's data set; DVC calls this."""
    from rrlhf.config import load_params
    from rrlhf.datasets import write_key
    from rrlhf.plan import Project

    with _clear_errors():
        root = Path.cwd()
        project = Project(root, profile, load_params(root, profile))
        write_key(out, project.document(project.nodes[0], {}))


@app.command(hidden=True)
def prepare(
    key: Annotated[Path, typer.Argument(help="Key document of the data stage.")],
    out: Annotated[Path, typer.Argument(help="Folder of the data set.")],
) -> None:
    """Make a data set from its key document; DVC calls this."""
    from rrlhf.artifacts import Store, clear
    from rrlhf.keys import key_digest
    from rrlhf.launch import call

    end_with_parent()
    with _clear_errors():
        document = json.loads(key.read_bytes())
        store, digest = Store(Path.cwd()), key_digest(document)
        with store.locked(digest):
            staged = clear(store.staging("prepare", digest))
            call(document, inputs={}, out=staged, log=lambda row: None)
            clear(out).rmdir()
            staged.rename(out)


def _run(profile: str, overrides: dict[str, Json], as_json: bool) -> None:
    """Run the flow in this process; with `as_json`, stdout holds its result and nothing else."""
    from rrlhf.config import load_params

    with _clear_errors():
        from rrlhf.starting import started

        root = Path.cwd()
        experiment = load_params(root, profile, overrides).tracking.experiment
        pipeline = started(root, experiment, "flows.pipeline").pipeline
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = pipeline(profile=profile, overrides=overrides)
        if as_json:
            print(json.dumps(result, indent=1))


def _overrides(profile: str, texts: list[str] | None) -> dict[str, Json]:
    """Parse --set options and check the settings, all mistakes at once, before anything starts."""
    from rrlhf.config import load_params, parse_override

    with _clear_errors():
        overrides = dict(parse_override(text) for text in texts or [])
        load_params(Path.cwd(), profile, overrides)
    return overrides


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn errors that people can mend into one message and an exit code; the rest keep their traceback."""
    from flows.serve import ServeError
    from rrlhf import progress
    from rrlhf.artifacts import TamperedError
    from rrlhf.datasets import BusyError, PrepareError
    from rrlhf.health import DivergedError
    from rrlhf.located import ParamsError
    from rrlhf.processes import LaunchError
    from rrlhf.tracking import TrackingError

    try:
        yield
    except ParamsError as error:
        _end(USAGE, str(error))
    except TamperedError as error:
        _end(VERIFICATION_FAILED, str(error))
    except BusyError as error:
        _end(BUSY, str(error))
    except (DivergedError, PrepareError, LaunchError, ServeError, TrackingError, ValueError) as error:
        _end(FAILED, str(error))
    except OSError as error:
        _end(FAILED, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _end(
            SIGNALLED + progress.signalled,
            "interrupted; finished stages are kept, and the same command goes on from there",
        )


def _mendable(command: Callable[P, None]) -> Callable[P, None]:
    """Have a command end as `_clear_errors` says."""

    @wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> None:
        with _clear_errors():
            command(*arguments, **options)

    return wrapped


for command in (promote, reproduce, sweep, chat):
    app.command()(_mendable(command))


def _end(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)

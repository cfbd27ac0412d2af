"""The `rrlhf` command. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.chat_command import chat
from rrlhf.command_line import FAILED, USAGE, AsJson, Profile, Set, mendable
from rrlhf.command_line import clear_errors as _clear_errors
from rrlhf.command_line import end as _end
from rrlhf.command_line import overrides as _overrides
from rrlhf.commands_run import plan, run, run_flow, status, why
from rrlhf.dvc_config import follow_git
from rrlhf.environment import end_with_parent, find_root, set_environment
from rrlhf.lineage.command import audit, diff, lineage
from rrlhf.promotion.command import promote
from rrlhf.reproduction.command import reproduce
from rrlhf.signing_command import keygen, sign
from rrlhf.sweeps.command import sweep

app = typer.Typer(
    name="rrlhf",
    help="Reward-robust RLHF as a reproducible pipeline.\n\nExit codes: 0 ok, 1 failed, 2 usage, 3 a stored file "
    "was changed, or a forced stage gave another result, 4 busy, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command in the project's folder, and end with its exit code."""
    if len(sys.argv) > 1 and not {"-h", "--help"} & set(sys.argv):
        try:
            root = find_root(Path.cwd())
            set_environment(root)
            follow_git(root)
        except FileNotFoundError as error:
            _end(USAGE, str(error))
    app()


for _command in (run, plan, why, status):
    app.command()(_command)
for _other in (lineage, diff, audit, promote, reproduce, sweep, chat, keygen, sign):
    app.command()(mendable(_other))


@app.command()
def report(profile: Profile = "default", set_: Set = None) -> None:
    """Write the HTML report of a finished run again, and print its path."""
    from rrlhf.params import load_params
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
    run_flow(profile, overrides)


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
    from rrlhf.judging.command import evaluate_reward as judged
    from rrlhf.judging.labelled import load_pairs
    from rrlhf.judging.report import show, strict, write
    from rrlhf.params import load_params

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
    from rrlhf.params import load_params

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
    out: Annotated[Path, typer.Argument(help="File for the key document of the data set.")],
    asked: Annotated[Path, typer.Argument(help="File for the digests of all that a run is asked for.")],
    profile: Profile = "default",
) -> None:
    """Write what the stages of a profile depend on; DVC calls this."""
    from rrlhf.dvc_pipeline import write_keys
    from rrlhf.params import load_params
    from rrlhf.plan import Project

    with _clear_errors():
        root = Path.cwd()
        write_keys(Project(root, profile, load_params(root, profile)), out, asked)


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

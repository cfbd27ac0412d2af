"""`rrlhf evaluate-reward`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.tools.command_line import AsJson, Profile, Set, overrides


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
        typer.Option(
            help="Labelled pairs: a file, a folder or a pattern (docs/data.md); left out, the model's held-out pairs."
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="rows (prompt, chosen, rejected), hh, ultrafeedback, or rewardbench (rows with a subset, of "
            "RewardBench or RewardBench 2)."
        ),
    ] = "rows",
    max_rejected: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows to leave out.")] = 0.0,
    perturb: Annotated[
        int, typer.Option(min=0, help="Perturbed texts of each kind to sample for every response; 0: none.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first pairs only.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the JSON and the HTML page.")] = Path(
        "reports/reward"
    ),
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
    from rrlhf.judging.labelled import load_pairs
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.judging.judge import judged
    from rrlhf.tools.judging.report import show, strict, write

    changed = overrides(profile, set_)
    params = load_params(Path.cwd(), profile, changed)
    pairs = load_pairs(data, format, max_rejected=max_rejected, limit=limit) if data else None
    report = judged(Path.cwd(), profile, params, model=model, pairs=pairs, perturb=perturb, limit=limit)
    written = write(report, out)
    if as_json:
        print(json.dumps(strict(report), indent=1))
    else:
        show(report, written[1])

"""`rrlhf evaluate-reward`."""

from pathlib import Path
from typing import Annotated

import typer

from rrlhf.tools.command_line import AsJson, Profile, Set, opened


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
    lookup = opened(profile, set_)
    artifact = lookup.reward_model(model)
    if artifact is None:
        raise ValueError(
            f"the ensemble of profile {profile} is not up to date; `rrlhf run` comes first, or name a model: "
            "rrlhf evaluate-reward rrlhf-ensemble@latest"
        )

    from rrlhf.judging.labelled import load_pairs
    from rrlhf.tools.judging.report import content, judged, show_report, write

    pairs = load_pairs(data, format, max_rejected=max_rejected, limit=limit) if data else None
    report = judged(lookup, artifact, pairs, perturb=perturb, limit=limit)
    page = write(report, out)
    if as_json:
        print(content(report))
    else:
        show_report(report, page)

"""`rrlhf toy`."""

from pathlib import Path
from typing import Annotated

import typer

from rrlhf.tools.command_line import AsJson


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
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for toy.json, toy.png and toy.svg.")] = Path(
        "reports", "toy"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare robust rewards on the paper's toy, where the optimum is known: 8 prompts, 8 responses.

    Example: rrlhf toy --labelled 0.25 --beta 0.1
    """
    from rrlhf.tools.reporting.plots import write_study
    from rrlhf.tools.reporting.tables import show
    from rrlhf.tools.toy.study import Setting, figure, study, table, verdict

    found = study(Setting(seeds, steps, beta, heads, labelled, interaction))
    told, *_ = write_study(out, "toy", found, {"toy": figure(found)})
    if as_json:
        print(told.read_text(encoding="utf-8"))
        return
    show(table(found), *verdict(found))
    print(f"\npicture: {out / 'toy.png'}")

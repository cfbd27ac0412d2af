"""The toy's table, verdict and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rrlhf.tools.reporting.plots import write_study
from rrlhf.tools.toy.study import GOLD, SINGLE, Arm, Interval, Study

SHOWN_MAPS = ("optimum", SINGLE, "robust 0.4", "constant")
SHOWN_COURSES = (SINGLE, "robust 1", "robust 0.4", "robust 0", "mean", GOLD)


def table(study: Study) -> Table:
    """Return every arm's result for the terminal."""
    shown = Table(title=f"mean ± 95 % interval over {study['setting']['seeds']:g} seeds", title_justify="left")
    for name in ("", "gold", "over single head", "KL(π*‖π)", "KL(π‖ref)"):
        shown.add_column(name, justify="right" if name else "left")
    for arm in study["arms"]:
        paired = "–" if arm["name"] == SINGLE else figures(arm["gold_over_single"], sign=True)
        moved = f"{arm['reference_kl']['mean']:.2f}"
        shown.add_row(arm["name"], figures(arm["gold"]), paired, figures(arm["optimum_kl"]), moved)
    return shown


def figures(interval: Interval, sign: bool = False) -> str:
    """Write a mean with half the width of its 95 % interval, "1.05 ± 0.12"."""
    mean = f"{interval['mean']:+.2f}" if sign else f"{interval['mean']:.2f}"
    return f"{mean} ± {interval['high'] - interval['mean']:.2f}"


def verdict(study: Study) -> list[str]:
    """Say what the numbers support, whether or not the method's claim holds."""
    arms = {arm["name"]: arm for arm in study["arms"]}
    robust = [arm for name, arm in arms.items() if name.startswith("robust")]
    relatives = [arm for name, arm in arms.items() if not name.startswith("robust") and name not in {SINGLE, GOLD}]
    return [
        f"The exact optimum has a gold reward of {figures(study['optimum_gold'])}, the reference "
        f"{figures(study['reference_gold'])}; the policy trained on the single head reaches "
        f"{figures(arms[SINGLE]['gold'])}.",
        _compared("the robust mixtures", robust),
        _compared("the other aggregations", relatives),
        _disagreement(study),
    ]


def _compared(group: str, arms: Sequence[Arm]) -> str:
    above = [arm["name"] for arm in arms if arm["gold_over_single"]["low"] > 0]
    below = [arm["name"] for arm in arms if arm["gold_over_single"]["high"] < 0]
    nearer = [arm["name"] for arm in arms if arm["optimum_kl_over_single"]["high"] < 0]
    best = max(arms, key=lambda arm: arm["gold"]["mean"])
    parts = [f"better than the single head: {', '.join(above) or 'none'}", f"worse: {', '.join(below) or 'none'}"]
    return (
        f"Gold of {group}, by paired 95 % intervals: {'; '.join(parts)}; the others cannot be told from it. Highest: "
        f"{best['name']}, {figures(best['gold_over_single'], sign=True)} over the single head. "
        f"Nearer to the optimum in KL: {', '.join(nearer) or 'none'}."
    )


def _disagreement(study: Study) -> str:
    spread = study["spread"]
    told = "; ".join(f"{kind} {figures(interval)}" for kind, interval in spread.items())
    if len(spread) < 2:
        return f"Spread of the heads over cells: {told}."
    known, unknown = spread["labelled"], spread["not labelled"]
    if unknown["low"] > known["high"]:
        reading = "they know where they guess"
    elif unknown["high"] < known["low"]:
        reading = "they agree most where they guess"
    else:
        reading = "their disagreement does not tell where they guess"
    return f"Spread of the heads over cells: {told}: {reading}."


def write(study: Study, folder: Path) -> None:
    """Write toy.json, toy.png and toy.svg into a folder; each appears whole or not at all."""
    write_study(folder, "toy", study, {"toy": _figure(study)})


def _figure(study: Study) -> Any:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.7, 1])
    gold, away, courses = above.subplots(1, 3, width_ratios=[1.2, 1, 1.1])
    _dots(gold, study, "gold", "expected gold reward", names=True)
    gold.axvline(study["optimum_gold"]["mean"], color="#009E73", linestyle="--", linewidth=1)
    gold.axvline(study["reference_gold"]["mean"], color="#595959", linestyle=":", linewidth=1)
    _dots(away, study, "optimum_kl", "KL(optimum ‖ policy), nats", names=False)
    _draw_courses(courses, study)
    for axes, name in zip(below.subplots(1, len(SHOWN_MAPS)), SHOWN_MAPS, strict=True):
        image = axes.imshow(study["maps"][name], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("response")
        axes.set_xticks([])
        axes.set_yticks([])
    below.axes[0].set_ylabel("prompt")
    below.colorbar(image, ax=below.axes, label="probability, first seed", shrink=0.8)
    return figure


def _dots(axes: Any, study: Study, what: str, label: str, *, names: bool) -> None:
    """Draw one interval per arm, the first at the top."""
    for row, arm in enumerate(study["arms"]):
        found: Interval = arm[what]  # type: ignore[literal-required]
        color = {SINGLE: "#D55E00", GOLD: "#009E73"}.get(
            arm["name"], "#0072B2" if arm["name"].startswith("robust") else "#595959"
        )
        axes.plot([found["low"], found["high"]], [row, row], color=color, linewidth=2)
        axes.plot(found["mean"], row, "o", color=color)
    labels = [arm["name"] for arm in study["arms"]] if names else []
    axes.set_yticks(range(len(study["arms"])) if names else [], labels)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#e3e3e3")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_courses(axes: Any, study: Study) -> None:
    styles = dict(zip(SHOWN_COURSES, ("#D55E00", "#56B4E9", "#0072B2", "#000000", "#CC79A7", "#009E73"), strict=True))
    for course in study["courses"]:
        if course["name"] in styles:
            axes.plot(course["steps"], course["gold"], color=styles[course["name"]], label=course["name"])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps of training")
    axes.set_ylabel("expected gold reward")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(color="#e3e3e3")
    axes.spines[["top", "right"]].set_visible(False)

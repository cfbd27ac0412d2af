"""The comparison of policies as tables: METRICS says which numbers there are, what they mean, and where they stand."""

from typing import Literal, NamedTuple

from rich.table import Column
from rich.table import Table as Drawn
from rich.text import Text

from rrlhf.judging.evaluation import Evaluation, Policy
from rrlhf.redact import visible
from rrlhf.tools.reporting.tables import Table, figures, known


class Metric(NamedTuple):
    """One number of a policy. The order of METRICS is that of every table."""

    meaning: str
    stands: Literal["first", "where there is room", "on the page"] = "on the page"
    axis: str = ""  # its label in a chart


METRICS = {
    "gold": Metric(
        "Score by an independent judge that no policy is trained against: the nearest thing here to real quality.",
        "first",
        "gold score",
    ),
    "second_opinion": Metric(
        "Score by a second judge, of another make, that no policy is trained against either.",
        "where there is room",
        "second opinion",
    ),
    "judge_win_rate": Metric(
        "How often the judge that you brought prefers the response to the start's. Ties are half; 0.5: as good.",
        "first",
    ),
    "judge_score": Metric("Score by the reward model that you brought as a judge.", "where there is room", "score"),
    "judge_ties": Metric("How often that judge finds both equally good, or the one that it is shown first better."),
    "gold_at_length": Metric(
        "Gold at the start's length: what mere length gains or loses is taken off.", "where there is room"
    ),
    "proxy": Metric(
        "Score by the single reward head, which plain PPO is trained to please. High with low gold: hacking.",
        "first",
        "proxy score",
    ),
    "reward": Metric("The reward that this arm was trained on or chooses by.", "where there is room", "reward"),
    "nominal": Metric("Score by the most confident head of the ensemble."),
    "worst": Metric("Score by whichever head likes the response least."),
    "mean": Metric("Average score over the heads of the ensemble."),
    "spread": Metric("How much the heads disagree about a response (standard deviation). High: they are guessing."),
    "sigma": Metric(
        "How unsure the ensemble is of a score: its standard deviation. High: far from what it learned from.",
        "where there is room",
        "σ of the reward",
    ),
    "kl": Metric(
        "How far the policy moved from its start, in nats per response. 0: not at all. Best of n: at most.", "first"
    ),
    "words": Metric("Words per response.", "first", "words per response"),
    "repetition": Metric("Share of words that occurred before in the same response, 0 to 1.", "where there is room"),
    "finished": Metric(
        "Share of responses that came to an end instead of being cut off, 0 to 1.", "where there is room"
    ),
    "relevance": Metric("A part of gold: how near a response is to its topic, 0 to 1."),
    "tone": Metric("A part of gold: from -1, cold, to 1, warm."),
    "nonwords": Metric("A part of gold that costs: share of words that are no English where they stand, 0 to 1."),
    "gibberish": Metric(
        "A part of gold that costs: how unlikely the text is to the untouched base model, 0 to 1.",
        "where there is room",
    ),
}
FIRST = [name for name, metric in METRICS.items() if metric.stands == "first"]  # as many as a terminal is wide
SAMPLES = 3  # prompts whose answers stand in the terminal


class Row(NamedTuple):
    """One metric of the comparison; a cell per policy."""

    name: str
    metric: Metric
    cells: list[str]


def rows(evaluation: Evaluation) -> list[Row]:
    """Return a row for every metric that some policy has: first the known ones in order, then any others."""
    present = [name for policy in evaluation.policies for name in policy.metrics]
    found = []
    for name in dict.fromkeys([*(name for name in METRICS if name in present), *present]):
        values = evaluation.measured(name)
        best = max(values, key=lambda policy: values[policy].mean, default=None) if name == "gold" else None
        cells = [
            f"{'★ ' if policy.name == best else ''}{figures(values[policy.name])}" if policy.name in values else "–"
            for policy in evaluation.policies
        ]
        value = Metric(f"Value of the reward function {name.removeprefix('function_')}.", "where there is room")
        found.append(Row(name, METRICS.get(name, value), cells))
    return found


def table(evaluation: Evaluation) -> Table:
    """Return the comparison for the terminal and for Markdown: a column for each policy."""
    header = ["", *(f"{policy.name}\n{reward_in_words(policy)}" for policy in evaluation.policies)]
    told = [[row.name, *row.cells] for row in rows(evaluation) if row.metric.stands != "on the page"]
    return Table("mean ± standard error over prompts, ★ the highest gold", header, told)


def samples(evaluation: Evaluation) -> Drawn:
    """Return what every policy answered to the first prompts, for the terminal."""
    title = "the same prompts, answered by each"
    gold = Column("gold", justify="right", no_wrap=True)
    shown = Drawn(Column(no_wrap=True), Column(ratio=1), gold, title=title, title_justify="left", expand=True)
    for sample in evaluation.samples[:SAMPLES]:
        shown.add_row("", Text(visible(sample.prompt), style="bold"))
        for name, answer in sample.responses.items():
            said = visible(" ".join(answer.text.split()))
            shown.add_row(Text(visible(name)), Text(said), known(answer.gold, 2))
        shown.add_section()
    return shown


def reward_in_words(policy: Policy) -> str:
    """Say by which reward a policy was made, with its settings and the weights of reward functions."""
    plain = {"none": "the start", "preferences": "the preferences, no reward model", "single": "one reward head"}
    by = f"best of {policy.n} by " if policy.n is not None else ""
    settings = [f"{name.replace('_', ' ')} {value:g}" for name, value in policy.settings.items()]
    functions = [f"{weight:+g} {path}" for path, weight in sorted(policy.functions.items())]
    return by + ", ".join([plain.get(policy.reward, policy.reward.replace("_", " ")), *settings, *functions])

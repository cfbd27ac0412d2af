"""The report says what the numbers say, needs no network, and lets no text act."""

import io
import math
import re
from dataclasses import replace
from functools import cache
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from rrlhf.judging.content import (
    Calibration,
    Coverage,
    GoldAgreement,
    Heads,
    Measured,
    ReliabilityBin,
    RewardJudgement,
    Share,
)
from rrlhf.judging.evaluation import Chosen, Evaluation, Excerpt, Point, Policy, Response, Sample
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.redact import visible
from rrlhf.tools.lineage.text import branches, line
from rrlhf.tools.reporting.comparison import reward_in_words, samples, table
from rrlhf.tools.reporting.plots import head_charts, looks_of, selection_charts
from rrlhf.tools.reporting.report import render
from rrlhf.tools.reporting.tables import show
from rrlhf.tools.reporting.verdict import Event, Training, columns, smoothed, smoothed_stderr, verdict


def measured(mean: float, stderr: float = 0.05) -> Measured:
    return Measured(mean, stderr, 96)


def policy(name: str, reward: str, weight: float | None = None, **means: float) -> Policy:
    metrics = {metric: measured(mean) for metric, mean in means.items()}
    return Policy(name, reward, {} if weight is None else {"nominal_weight": weight}, metrics)


def curve(name: str, golds: list[float | None], proxies: list[float], stderr: float | None = 0.1) -> list[Point]:
    return [
        Point(name, update, update - 0.1, proxy, 9.0, [proxy - 0.2, proxy, proxy + 0.3], 0.5, None, gold, stderr)
        for update, (gold, proxy) in enumerate(zip(golds, proxies, strict=True))
    ]


def share(mean: float) -> Share:
    return Share(mean, 0.05, 96, mean - 0.1, mean + 0.1)


def judgement(name: str, accuracies: dict[str, float], heads: Heads | None = None) -> RewardJudgement:
    calibration = Calibration(0.05, 0.12, 0.21, 0.61, None, [ReliabilityBin(0.61, 0.66, 96, 0.56, 0.75)])
    accuracy = {reading: share(accuracy) for reading, accuracy in accuracies.items()}
    return RewardJudgement(name, 96, 48, accuracy, calibration, heads)


def agreement(name: str) -> GoldAgreement:
    return GoldAgreement(name, 0.51, [Coverage(0.9, measured(0.77))], 0.21, None, None)


HEADS = Heads(
    accuracy=[share(0.61), share(0.6)],
    correlation=[[1.0, 0.7], [0.7, None]],
    spread=measured(0.5),
    sigma=0.3,
    coverage=[Coverage(0.9, measured(0.42))],
    spread_warns=0.11,
    sigma_warns=None,
)
RISING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
HACKED: list[float | None] = [0.4, 0.8, 1.0, 1.0, 1.0, 0.2, -0.5, -1.2]
HELD: list[float | None] = [0.4, 0.8, 1.0, 1.2, 1.3, 1.3, 1.2, 1.3]


def evaluation(
    *, hacked: list[float | None] = HACKED, single_gold: float = -1.2, robust_gold: float = 1.3, **changes: Any
) -> Evaluation:
    found = Evaluation(
        policies=[
            policy("sft", "none", gold=0.4, proxy=0.0, spread=0.5, kl=-0.01),
            policy("single", "single", gold=single_gold, proxy=7.0, spread=1.0, kl=16.0),
            policy("robust", "robust", 0.4, gold=robust_gold, proxy=5.0, spread=0.8, kl=16.0, robust=2.0),
        ],
        curves=curve("single", hacked, RISING) + curve("robust", HELD, RISING),
        samples=[answered("Write a line.")],
        reward_models=[
            judgement("single head", {"single head": 0.62}),
            judgement("ensemble", {"mean": 0.63, "worst": 0.64}, HEADS),
        ],
        gold_agreement=[agreement("sft"), agreement("single")],
    )
    return replace(found, **changes)


def answered(prompt: str, **texts: str) -> Sample:
    said = {"sft": "Fine.", "single": "Fine.", "robust": "Fine."} | texts
    return Sample(prompt, {name: Response(text, 0.1, [0.1, 0.2, 0.4], 0.3) for name, text in said.items()})


def brief(**changes: Any) -> Evaluation:
    """The policies alone, of which a page is drawn in no time."""
    return replace(Evaluation(evaluation().policies, curves=[], samples=[], reward_models=[]), **changes)


def without_gold(**changes: Any) -> Evaluation:
    judged = evaluation()
    arms = [replace(arm, metrics={k: v for k, v in arm.metrics.items() if k != "gold"}) for arm in judged.policies]
    answers = {name: replace(answer, gold=None) for name, answer in judged.samples[0].responses.items()}
    bare = replace(judged, policies=arms, curves=curve("single", [None] * 8, RISING))
    return replace(bare, samples=[Sample("Write a line.", answers)], **changes)


def ancestry(note: str = "") -> tuple[Graph, Product]:
    """A policy from an SFT model and a reward model, which are from one data set."""
    document: Any = {"stage": "ppo", "params": {"ppo": {"updates": 8}, "note": note}}
    data = Product("md5:" + "d" * 32 + ".dir", "data", "prepare", names=("default",))
    sft = Product("a" * 64, "sft", "sft", inputs={"data": data.digest, "base": "random:2x32"}, names=("rrlhf-sft/1",))
    reward = Product("b" * 64, "reward", "reward", inputs={"data": data.digest, "sft": sft.digest})
    inputs = {"data": data.digest, "sft": sft.digest, "reward": reward.digest}
    made = Product("c" * 64, f"ppo-{note or 'robust'}", "ppo", inputs=inputs, document=document)
    return Graph([made, reward, sft, data]), made


def html(of: Evaluation, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "profile": "default",
        "params": {"ppo": {"updates": 8}},
        "lineage": ancestry(),
        "facts": {"git": "abc"},
        "trained": {},
    }
    return render(of, **(arguments | changes))


@cache
def whole() -> str:
    """The page of all there is, drawn once: its charts take most of a second."""
    return html(evaluation())


def test_the_verdict_names_the_best_arm_and_tells_of_each_against_the_start() -> None:
    assert verdict(evaluation(), trained(WARNED)) == [
        "By the independent judge, single is worse than the start; robust is better than the start.",
        "robust has the highest gold, +2.50 (+2.36 to +2.64) over single.",  # the error is sqrt(2) * .05
        "single against the start: gold -1.60 (-1.74 to -1.46), proxy +7.00 (+6.86 to +7.14); "
        "gold fell by 1.50 ± 0.08 from its best, around update 3, while the reward rose; "
        "hacking suspected at rollout 5 (warned).",
        "robust against the start: gold +0.90 (+0.76 to +1.04), proxy +5.00 (+4.86 to +5.14); no warning.",
    ]


def test_a_difference_below_two_standard_errors_is_called_noise() -> None:
    head, first, *_ = verdict(evaluation(robust_gold=0.53, single_gold=0.52), {})
    assert head == "By the independent judge, single and robust are not clearly different from the start."
    assert first == "robust has the highest gold, +0.01 (-0.13 to +0.15) over single, which may be noise."


@pytest.mark.parametrize(
    ("golds", "proxies"),
    [(HELD, RISING), ([1.0] * 5 + [0.8] * 3, RISING), (HACKED, RISING[::-1]), (HACKED[:2], RISING[:2])],
    ids=["no fall", "between two and three errors", "without the proxy", "too few updates"],
)
def test_over_optimisation_is_a_clear_fall_of_gold_while_the_proxy_rises(
    golds: list[float | None], proxies: list[float]
) -> None:
    assert "gold fell" in " ".join(verdict(evaluation(), {}))
    assert "gold fell" not in " ".join(verdict(evaluation(curves=curve("single", golds, proxies)), {}))


def test_without_gold_the_verdict_speaks_of_reward_models_only() -> None:
    sentences = verdict(without_gold(), {})
    assert sentences[0].startswith("No independent judge read this run")
    assert sentences[1].startswith("single has the highest proxy")
    page = html(without_gold())
    assert "Gold over training" not in page
    assert "gold <strong>" not in page


def test_one_policy_without_curves_or_samples_gives_a_page() -> None:
    lonely = Evaluation(evaluation().policies[:1], curves=[], samples=[], reward_models=[])
    assert verdict(lonely, {}) == ["There is no trained arm to compare with the start."]
    page = html(lonely, lineage=None, facts={})
    assert "<img" not in page
    assert "Samples" not in page


def test_missing_metrics_and_errors_are_left_out() -> None:
    sparse = evaluation(curves=curve("single", HACKED, RISING, stderr=None))
    sparse.policies[1] = replace(sparse.policies[1], metrics={"gold": measured(1.0, math.nan)})
    assert verdict(sparse, {})[1] == "robust has the highest gold, +0.30 over single, which may be noise."
    assert "nan" not in " ".join(verdict(sparse, {}))
    assert "nan" not in html(sparse).split("<figure>")[0]


def test_twenty_heads_or_one_can_be_drawn() -> None:
    for count in (1, 20):
        curves = [replace(point, heads=[i / 10 for i in range(count)]) for point in evaluation().curves]
        case = evaluation(curves=curves)
        assert [chart.description for chart in head_charts(case, looks_of(case))] == [f"{count} heads"] * 2


def test_the_page_loads_nothing() -> None:
    page = whole()
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert len(loaded) == 10  # six panels, the heads of two arms, two reliabilities
    assert all(source.startswith("data:image/svg+xml;base64,") for source in loaded)
    assert not re.search(r"<script|<link|<iframe|@import|@font-face|srcset|url\((?!#)|http://|https://|//cdn", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_text_from_models_and_settings_is_escaped() -> None:
    nasty = "<script>alert(1)</script>"
    planted = brief(samples=[answered(nasty, single=f"{nasty}\x1b[31mred\u202eder")])
    page = html(planted, params={"ppo": {"note": nasty}}, lineage=ancestry(nasty), facts={nasty: nasty})
    assert "<script" not in page
    # prompt, response, params, fact and its name; of the lineage a product's line and details (twice)
    assert page.count("&lt;script&gt;alert(1)") == 5 + 3
    assert "⟨U+001B⟩[31mred⟨U+202E⟩der" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


class Live(HTMLParser):
    """What a browser would make of a page: its elements and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attrs)}


NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></div></td></table></style></title><svg onload=alert(1)>",
    "\"'><iframe srcdoc='<b onclick=1>'>",
    "<!--><base href=//evil><!-- {{ 7 * 7 }} {% raw %}",
    "\0<\0script>\ud800\u2028</SCRIPT>\r<a href=javascript:alert(1)>x</a>",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_a_browser_finds_no_element_in_a_page_that_a_text_brought(nasty: str) -> None:
    def elements(text: str) -> set[str]:
        named = policy(text, "single", gold=1.0)
        planted = brief(samples=[answered(text, single=text)], excerpts={"single": [wrote(4, 0, text)]})
        planted = replace(planted, policies=[*planted.policies, named])
        live = Live()
        live.feed(html(planted, params={"ppo": {text: text}}, lineage=ancestry(text), facts={text: text}))
        return live.found

    assert elements(nasty) == elements("plain")


def test_reward_models_are_shown_with_calibration_heads_and_gold() -> None:
    page = whole()
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"ensemble, worst\s+0.64 ± 0.05\s+\(n = 96\)\s+0.54 to 0.74", text)
    assert re.search(r"single head\s+0.050\s+0.120\s+0.210\s+0.610\s+–", text)
    assert re.search(r"coverage of 90 %\s+0.42 ± 0.05", text)
    assert re.search(r"single\s+0.51\s+0.77 ± 0.05\s+0.21\s+–", text)
    assert "dashed: held-out pairs" in page
    assert page.count("Chart: Reliability of") == 2


def with_other_methods() -> Evaluation:
    more = evaluation()
    direct = replace(policy("direct", "preferences", gold=0.9), method="dpo")
    choosy = replace(policy("choosy", "robust", 0.4, gold=1.1, kl=2.84), method="best_of_n", n=16)
    golds = ((1, 0.4), (2, 0.9), (4, 1.2), (16, 1.1))
    selection = [Chosen("choosy", n, 0.5, measured(n / 10), measured(gold)) for n, gold in golds]
    return replace(more, policies=[*more.policies, direct, choosy], selection=selection)


def test_other_methods_are_named_and_best_of_n_is_drawn_over_n() -> None:
    page = html(with_other_methods())
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "aligned 4 times: by PPO to please a reward, where nothing else is said." in text
    assert "direct the preferences, no reward model" in text
    assert "best of 16 by robust, nominal weight 0.4" in text
    assert page.count("Chart: Gold by n") == page.count("Chart: Reward by n") == 1
    assert "trained 2 times by PPO" in " ".join(re.sub(r"<[^>]+>", " ", whole()).split())


def test_best_of_n_without_gold_is_drawn_by_its_reward_alone() -> None:
    case = without_gold(selection=[Chosen("single", n, 0.1, measured(n)) for n in (1, 2)])
    assert [chart.title for chart in selection_charts(case, looks_of(case))] == ["Reward by n"]


def trained(*events: Event) -> dict[str, Training]:
    rows = [{"step": n, "kl": 0.1 * n, "entropy": 3.0 - 0.1 * n, "finished": 0.9} for n in range(8)]
    return {"single": Training(list(events), rows), "robust": Training([], rows[:5])}


WARNED = Event(5, "hacking_suspected", "score from 0.1 to 2.0", "warned")


def test_the_health_of_every_training_is_told_and_drawn() -> None:
    page = html(brief(), trained=trained(WARNED))
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"single\s+, rollout 5:\s+hacking suspected\s+. score from 0.1 to 2.0; warned.", text)
    assert re.findall(r'Chart: (KL|Entropy|Finished|Clip fraction)"', page) == ["KL", "Entropy", "Finished"]
    assert "a dotted line marks" in page


def test_a_healthy_training_is_said_to_be_healthy() -> None:
    page = html(brief(), trained=trained())
    assert "No detector fired in any training." in page
    assert "a dotted line marks" not in page


def test_arms_that_were_not_watched_have_no_health() -> None:
    page = whole()
    assert "Health of the training" not in page
    assert "What they wrote" not in page


def wrote(row: int, update: int, text: str, kl: float | None = 1.25) -> Excerpt:
    return Excerpt(update, row, f"Prompt {row}", text, True, kl, 0.5, [0.1])


def test_what_a_policy_wrote_as_it_trained_is_shown_by_prompt_and_escaped() -> None:
    some = brief(excerpts={"single": [wrote(4, 0, "At first."), wrote(4, 9, "<b>Sure"), wrote(7, 3, " ", None)]})
    text = re.sub(r"<[^>]+>", " ", html(some).split("What they wrote as they trained")[1])
    assert re.search(r"Prompt 4\s+rollout 0\s+At first.\s+proxy 0.50 · KL 1.2\s+rollout 9\s+&lt;b&gt;Sure", text)
    assert re.search(r"Prompt 7\s+rollout 3\s+\(empty\)\s+proxy 0.50 · KL –", text)


def test_the_page_fits_a_phone_and_paper() -> None:
    page = whole()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "@media print" in page
    assert "details.printed::details-content" in page
    assert len(re.findall(r"<table", page)) == len(re.findall(r'<div class="scroll">\s*<table', page))


def test_the_lineage_has_every_product_with_its_settings() -> None:
    graph, made = ancestry()
    listed = whole().split('<ul class="branches">')[1].split("</ul>")[0]
    there = branches(graph, made)
    assert {branch.product for branch in there} == {*graph.up(made)}
    assert all(line(branch.product) in listed for branch in there)
    assert listed.count("<details>") == sum(not branch.again for branch in there)
    assert '<th scope="row">params.ppo.updates</th><td>8</td>' in listed


def test_exact_parameters_can_be_opened() -> None:
    params = {"ppo": {"updates": 8, "learning_rate": 3e-4}, "arms": {"robust": {"nominal_weight": 0.4}}}
    folded = html(brief(), params=params).split("<summary>All parameters</summary>")[1].split("</details>")[0]
    assert yaml.safe_load(unescape(re.sub("</?pre[^>]*>", "", folded))) == params


def test_every_head_scores_every_sample_and_the_lowest_is_marked() -> None:
    page = whole()
    assert (
        page.count('<div class="heads">heads <span class="lowest">0.10</span> <span>0.20</span> <span>0.40</span>') == 3
    )


def test_visible_keeps_ordinary_text() -> None:
    assert visible("né 猫 😀\n\tok") == "né 猫 😀\n\tok"
    assert visible("\x00\r\x9b\ud800") == "⟨U+0000⟩⟨U+000D⟩⟨U+009B⟩⟨U+D800⟩"


def test_the_same_numbers_give_the_same_page() -> None:
    assert html(evaluation()) == whole()


def test_the_terminal_table_marks_the_highest_gold_and_names_both_weights(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    show(table(evaluation()))
    text = capsys.readouterr().out
    assert "★ 1.30 ± 0.05" in text
    assert "robust, nominal weight 0.4" in text
    assert re.search(r"robust +│ +– │ +– │ +2.00 ± 0.05", text)


def test_the_terminal_shows_the_first_prompts_with_every_answer_and_its_gold() -> None:
    answers = {"sft": Response("Two\nlines.", 0.0, [], 1.0), "robust": Response("\x1bred", 0.0, [], -0.5)}
    case = evaluation(samples=[Sample(f"Question {i}?", answers) for i in range(4)])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(samples(case))
    text = console.export_text()
    assert "Question 2?" in text
    assert "Question 3?" not in text
    assert re.search(r"sft +│ Two lines\. +│ +1\.00", text)
    assert re.search(r"robust +│ ⟨U\+001B⟩red +│ +-0\.50", text)


def test_neighbouring_updates_are_averaged_three_by_three() -> None:
    found = {values: smoothed(np.array(values)).tolist() for values in ((1.0, 2.0, 6.0, 10.0), (1.0, 3.0), ())}
    assert [*found.values()] == [pytest.approx([3, 6]), [2], []]
    assert smoothed_stderr(np.array([0.3, 0.6, 0.6])).tolist() == [pytest.approx(0.3)]  # sqrt(.09 + .36 + .36) / 3


def test_a_row_counts_where_all_that_is_asked_for_is_known() -> None:
    rows = [{"a": 1, "b": 2}, {"a": 2}, {"a": 3, "b": None}, {"a": 4, "b": math.inf}, {"a": 5, "b": 0}]
    assert [column.tolist() for column in columns(rows, "a", "b")] == [[1, 5], [2, 0]]
    assert [column.tolist() for column in columns([], "a", "b")] == [[], []]


def test_a_reward_is_told_with_its_settings_and_functions() -> None:
    arm = policy("arm", "batch_robust", 0.4, gold=0.0)
    assert reward_in_words(arm) == "batch robust, nominal weight 0.4"
    chosen = replace(arm, n=4, functions={"my_rules:no_lists": 0.5, "package.verify:correct": -2.0})
    assert reward_in_words(chosen) == (
        "best of 4 by batch robust, nominal weight 0.4, +0.5 my_rules:no_lists, -2 package.verify:correct"
    )

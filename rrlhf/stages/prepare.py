"""Stage 1: prompts and preferences, split by prompt.

Written tasks are answered by the base model and judged by the gold judge: the best answer to a prompt becomes a
demonstration, pairs of answers become preferences, and a stated share of the training labels is flipped
(the protocol of Gao et al. 2022, arXiv 2210.10760, and Coste et al. 2023, arXiv 2310.02743). All answers are sampled
at one temperature, below 1: a start that imitates the best of them writes much as they read, so the pairs are about
the kind of text that will be optimised. Human preference data brings its own answers and labels.
"""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rrlhf.config import Gold, Model, Prepare
from rrlhf.data.fingerprints import fingerprint, row_hash, write_hashes
from rrlhf.data.load import Good, Rejected, read_preferences, split_by_prompt
from rrlhf.data.rows import RowError
from rrlhf.data.tables import SCHEMAS, Row, Rows, write_tables
from rrlhf.data.tasks import WritingTask, writing_tasks
from rrlhf.judging.gold import GoldJudge
from rrlhf.models.load import load_base
from rrlhf.models.rollout import sample_in_batches
from rrlhf.models.text import NoRoomError, RefusedError, Texts, decode
from rrlhf.types import SUMMARY, Json, Log, Message

ROOM = 0.75  # of the token limit is the longest demonstration: who imitates it needs some to come to an end as well


class Answer(NamedTuple):
    """One answer of the base model with the judge's verdict."""

    text: str
    finished: bool
    tokens: int  # its end included
    gold: float


def run(*, seed: int, model: Model, prepare: Prepare, gold: Gold, out: Path, log: Log) -> None:
    """Write one parquet table per split, the hash of every row, and a summary."""
    told: dict[str, Json] = {}
    if prepare.source == "written":
        tables, summary = _written(seed, model, prepare, gold)
        counts, hashes = _write(((name, row) for name, rows in tables.items() for row in rows), out)
    else:
        texts = Texts(load_base(model, weights=False), model, keeps_prompts=False)
        rejected, columns = list[Rejected](), set[str]()
        counts, hashes = _write(_human(seed, prepare, _read(prepare, texts, rejected), columns), out)
        good = sum(counts.values())
        summary = {"rows": good, "rejected_rows": len(rejected)}
        told = {"rejected": _write_rejected(rejected, good, out), "columns": [*sorted(columns)]}
        summary |= texts.told("prepare")
    for name, count in counts.items():
        if not count:
            raise ValueError(_unanswered(name) if prepare.source == "written" else _empty(name))
    write_hashes(out, hashes)
    summary |= {f"{name}_rows": count for name, count in counts.items()}
    marks = {name: fingerprint(some) for name, some in hashes.items()}
    text = json.dumps({**summary, **told, "fingerprints": marks}, indent=1)
    (out / SUMMARY).write_text(text, encoding="utf-8")
    log({"step": 0, **summary})


def _write(rows: Iterable[tuple[str, Row]], out: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Write rows, each with its table's name; return how many a table has, and the hashes of its rows."""
    hashes: dict[str, list[str]] = {name: [] for name in SCHEMAS}

    def hashed() -> Iterator[tuple[str, Row]]:
        for name, row in rows:
            hashes[name].append(row_hash(row))
            yield name, row

    return write_tables(out, hashed()), hashes


def _written(seed: int, model: Model, prepare: Prepare, gold: Gold) -> tuple[dict[str, Rows], dict[str, float]]:
    tasks = sorted(writing_tasks(), key=lambda task: hashlib.sha256(f"{seed}:{task.text}".encode()).digest())
    tasks = tasks[: prepare.limit]
    split = split_by_prompt([_as_prompt(task) for task in tasks], prepare.shares.model_dump(), seed)
    for name in prepare.shares.model_dump():
        if name not in split:
            raise ValueError(_empty(name))  # before the answers take their time
    answered = [task for task, name in zip(tasks, split, strict=True) if name in {"sft", "preferences", "heldout"}]
    answers = dict(zip(answered, _answers(answered, seed, model, prepare, gold), strict=True))
    tables: dict[str, Rows] = {name: [] for name in SCHEMAS}
    noise = random.Random(seed)
    for task, name in zip(tasks, split, strict=True):
        if name == "sft":
            tables[name] += _demonstration(task, answers[task], round(ROOM * model.response_tokens))
        elif name in {"ppo", "evaluate"}:
            tables[name].append({"prompt": _as_prompt(task), "topic": task.topic})
        else:
            rate = prepare.flip_rate if name == "preferences" else 0.0
            tables[name] += _pairs(task, answers[task], rate, noise)
    everything = [answer for group in answers.values() for answer in group]
    return tables, {
        "answers": len(everything),
        "finished": fmean(answer.finished for answer in everything),
        "gold": fmean(answer.gold for answer in everything),
        "flipped": sum(row["flipped"] for row in tables["preferences"]) / max(len(tables["preferences"]), 1),
    }


def _answers(tasks: list[WritingTask], seed: int, model: Model, prepare: Prepare, gold: Gold) -> list[list[Answer]]:
    """Sample `answers_per_prompt` answers to each task and judge them."""
    language = load_base(model)
    texts, repeats = Texts(language, model), prepare.answers_per_prompt
    prompts = [texts.prompt(_as_prompt(task)) for task in tasks for _ in range(repeats)]
    texts.told("prepare")
    responses = sample_in_batches(
        language,
        prompts,
        model,
        batch_size=prepare.batch_size,
        seed=seed,
        label="prepare: sampling",
        temperature=prepare.temperature,
    )
    said = [decode(language, response.tokens) for response in responses]
    finished = [response.finished for response in responses]
    topics = [task.topic for task in tasks for _ in range(repeats)]
    surprise = [-response.logprob / len(response.tokens) for response in responses]
    scores = GoldJudge(gold).score(topics, said, finished, surprise).total
    lengths = [len(response.tokens) for response in responses]
    judged = [Answer(*answer) for answer in zip(said, finished, lengths, scores, strict=True)]
    return [judged[i : i + repeats] for i in range(0, len(judged), repeats)]


def _demonstration(task: WritingTask, answers: list[Answer], longest: int) -> Rows:
    """Return the best complete answer of at most so many tokens, if there is one.

    Imitating a cut-off answer teaches to stop in mid-sentence.
    """
    complete = [answer for answer in answers if answer.finished and answer.text and answer.tokens <= longest]
    if not complete:
        return []
    best = max(complete, key=lambda answer: answer.gold)
    return [{"prompt": _as_prompt(task), "response": best.text}]


def _pairs(task: WritingTask, answers: list[Answer], flip_rate: float, noise: random.Random) -> Rows:
    """Return every pair of different, non-empty answers, labelled by gold, with a share of labels flipped."""
    rows: Rows = []
    for one, other in itertools.combinations(answers, 2):
        better, worse = (one, other) if one.gold >= other.gold else (other, one)
        if not (one.text and other.text) or one.text == other.text:
            continue
        flipped = noise.random() < flip_rate
        chosen, rejected = (worse, better) if flipped else (better, worse)
        rows.append({"prompt": _as_prompt(task), "chosen": chosen.text, "rejected": rejected.text, "flipped": flipped})
    return rows


def _read(prepare: Prepare, texts: Texts, rejected: list[Rejected]) -> Iterator[Good]:
    """Read the source; rows whose prompt the model cannot be asked are rejected before anything trains on others."""

    def check(prompt: list[Message]) -> None:
        try:
            texts.prompt(prompt)
        except RefusedError as error:
            raise RowError("refused_by_template", f"the chat template says: {error.said}") from None
        except NoRoomError as error:
            raise RowError("no_room", str(error)) from None

    return read_preferences(
        prepare.source,
        format=prepare.format,
        max_rejected=prepare.max_rejected,
        limit=prepare.limit,
        revision=prepare.revision,
        config=prepare.config,
        split=prepare.split,
        check=check,
        rejected=rejected,
    )


def _human(seed: int, prepare: Prepare, rows: Iterable[Good], columns: set[str]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of the tables, each with its table's name; add the columns for reward functions to `columns`."""
    shares = prepare.shares.model_dump()
    for pair, more in rows:
        columns.update(more)
        [name] = split_by_prompt([pair.prompt], shares, seed)
        if name == "sft":
            yield name, {"prompt": pair.prompt, "response": pair.chosen}
        elif name in {"ppo", "evaluate"}:
            kept = json.dumps(more, sort_keys=True) if more else None
            yield name, {"prompt": pair.prompt, "topic": None, "columns": kept}
        else:
            yield name, {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "flipped": None}


def _write_rejected(rejected: list[Rejected], good: int, out: Path) -> dict[str, Json]:
    """Write every rejected row with its rule; say and return how many each rule rejected."""
    lines = [json.dumps(row._asdict()) + "\n" for row in rejected]
    (out / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = Counter(row.rule for row in rejected).most_common()
    if counts:
        by_rule = ", ".join(f"{count} {rule}" for rule, count in counts)
        print(
            f"prepare: {len(rejected)} of {len(rejected) + good} rows are left out: {by_rule}; each stands in "
            "rejected.jsonl",
            file=sys.stderr,
        )
    return dict(counts)


def _empty(name: str) -> str:
    return f"prepare: no rows for {name}; raise prepare.shares.{name} or prepare.limit"


def _unanswered(name: str) -> str:
    return (
        f"prepare: no rows for {name}: the base model's answers are all cut, empty or the same; raise "
        "model.response_tokens or prepare.answers_per_prompt"
    )


def _as_prompt(task: WritingTask) -> list[Message]:
    return [Message(role="user", content=task.text)]

"""Whether all that a run starts from is there and fits its settings: told at once, before anything is computed.

What is known of a base is found without reading its weights and kept under .rrlhf, so that a plan imports torch only
for a base that it never saw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.config import AnyJudge, ChatJudge, Given, Model, Params
from rrlhf.data.files import is_hub_id, source_digest
from rrlhf.located import ParamsError
from rrlhf.memo import Memo, Memory
from rrlhf.models.sources import base_digest, base_location
from rrlhf.pipeline.keys import external_digests, key_digest
from rrlhf.pipeline.plan import Planned, computing
from rrlhf.types import Message

if TYPE_CHECKING:
    from rrlhf.models.load import LanguageModel
    from rrlhf.pipeline.artifacts import Artifact
    from rrlhf.pipeline.plan import Project

KNOWN = Path(".rrlhf", "models.json")
QUESTION = [Message(role="user", content="A question?")]


class Facts(NamedTuple):
    """What a base model is, for settings that depend on it."""

    problems: Sequence[str] = ()  # why it cannot be used, a line each
    notes: Sequence[str] = ()  # what a person should know of how it is used
    layers: int | None = None  # None: unknown
    maps: Sequence[str] = ()  # names of those that adapters can stand beside; none: unknown
    scores: bool = False  # whether it is a reward model, with a head of its own


def check_sources(project: Project, *, fetch: bool = False) -> None:
    """Raise ParamsError when a base model, source data, a reward function, a key or a runner cannot be had or used.

    It tells every mistake. What a person should know of how the models are used is then in the project's notes.
    fetch: whether models that lie on the hub alone are downloaded for it.
    """
    from rrlhf.policy.reward_functions import load_functions

    memo, mistakes, config = project.store.memo, list[str](), project.root / ".dvc" / "config"
    if not config.is_file():
        mistakes.append(
            f"{config}: no such file, without which DVC keeps no data set: copy the project with its hidden files"
        )
    runner = project.params.launch.runner
    if runner != "threads" and not find_spec(f"prefect_{runner}"):
        mistakes.append(f"launch.runner: {runner} needs prefect-{runner}: pip install 'rrlhf[{runner}]'")
    for node in project.nodes:
        with _collected(mistakes):
            external_digests(node, memo)
    paths = [path for node in project.nodes for path in node.functions]
    needed: list[str] = []
    with _collected(mistakes):
        needed = [name for function in load_functions(paths) for name in function.needs]
    with _collected(mistakes):
        columns = _columns(project, frozenset(needed), made=project.data() if not mistakes else None)
        if needed:
            load_functions(paths, columns)
    with _collected(mistakes):
        project.check_keys()
    with _collected(mistakes):
        found, project.notes = check_models(project.params, project.root, memo, fetch=fetch)
        mistakes += found
    if mistakes:
        raise ParamsError("\n".join(dict.fromkeys(mistakes)))


def check_judge(judge: AnyJudge | None, planned: Iterable[Planned]) -> None:
    """Raise ParamsError when policies are to be compared and the judge behind an address does not answer."""
    if isinstance(judge, ChatJudge) and any(one.node == "evaluate" for one in computing(planned)):
        from rrlhf.judging.chat import check_chat

        check_chat(judge)


def check_columns(project: Project, data: Path) -> None:
    """Raise ParamsError where a reward function needs a column that a data set has not, now that it is made.

    Before that, those of a data set on the hub are not known.
    """
    from rrlhf.data.load import further_columns
    from rrlhf.policy.reward_functions import load_functions

    load_functions((path for node in project.nodes for path in node.functions), further_columns(data))


def _columns(project: Project, wanted: frozenset[str], made: Artifact | None) -> Collection[str] | None:
    """Return the columns that the data has for reward functions; None where only the stage can tell.

    made: the data set, if it is there; else the source is read as far as its first good row and those that are
    wanted. Raises ParamsError when it has no good row.
    """
    from rrlhf.data.load import columns_to_hand_on, further_columns

    prepare = project.params.prepare
    if prepare.source == "written":
        return ()
    if made:
        return further_columns(made.path)
    if is_hub_id(prepare.source):
        return None
    digest = source_digest(prepare, project.store.memo)
    try:
        return columns_to_hand_on(prepare.source, prepare.format, wanted, digest)
    except ValueError as error:
        raise ParamsError(f"prepare.source {error}") from None


@contextmanager
def _collected(mistakes: list[str]) -> Iterator[None]:
    """Note a mistake in the settings instead of raising it."""
    try:
        yield
    except ParamsError as error:
        mistakes.append(str(error))


def check_models(params: Params, root: Path, memo: Memo, *, fetch: bool) -> tuple[list[str], list[str]]:
    """Return every mistake in the settings about language models, and notes on how these are used.

    fetch: whether what lies on the hub alone is downloaded for it; otherwise a note says that it was not looked at.
    """
    reward, models, judge = params.reward, params.ensemble.models, params.evaluate.judge
    named = {f"ensemble.models.{number}": each for number, each in enumerate(models)}
    named |= {"evaluate.judge": judge} if isinstance(judge, Given) else {}
    as_is = {**named, **({"reward": reward} if reward.head == "own" else {})}
    found = {"model": facts(params.model, "model", root, memo, fetch=fetch)}
    for section, own in {"reward": reward, **named}.items():
        language = own.language_model(params.model)
        if own.base is not None or language != params.model:
            found[section] = facts(language, section if own.base else "model", root, memo, fetch=fetch)
    mistakes = [problem for each in found.values() for problem in each.problems]
    mistakes += _misfits(params, found["model"], found.get("reward", found["model"]))
    mistakes += [
        f"{section}.base {own.base}: a language model, and no reward model that scores by itself, which config.json "
        "would name as ...ForSequenceClassification; heads are trained on one that is named as reward.base alone"
        for section, own in as_is.items()
        if found[section].layers is not None and not found[section].scores
    ]
    return [*dict.fromkeys(mistakes)], [*dict.fromkeys(note for each in found.values() for note in each.notes)]


def facts(model: Model, section: str, root: Path, memo: Memo, *, fetch: bool) -> Facts:
    """Return what is known of a base, looking at it if it is new; section: where the settings name it."""
    digest = base_digest(model, memo, section)
    if model.base.startswith("random:"):
        return Facts(layers=int(model.base.removeprefix("random:").partition("x")[0]))
    read = {"base": digest, "params": model.model_dump(), "of": section, "reward_model": section != "model"}
    key = key_digest(read | {library: version(library) for library in ("transformers", "rrlhf")})
    memory = Memory(root / KNOWN)
    if key not in memory.known:
        found = _looked_at(model, section, fetch=fetch)
        if found is None:
            note = f"{section}.base {model.base}: not looked at, its files are not here; a run does first"
            return Facts(notes=[note])
        if found.problems:  # which may be mended elsewhere, as by installing what it needs
            return found
        memory.known[key], memory.grew = found._asdict(), True
        memory.save()
    return Facts(**memory.known[key])


def _misfits(params: Params, model: Facts, trunk: Facts) -> Iterator[str]:
    """Say which settings ask a model for layers, or maps to adapt, that it does not have."""
    ppo, dpo, reward = params.ppo, params.dpo, params.reward
    methods = {arm.method for arm in params.arms.values()}
    for setting, layers, base, matters in (
        ("sft.train_layers", params.sft.train_layers or 0, model, True),
        ("ppo.train_layers", ppo.train_layers, model, "ppo" in methods and ppo.trains != "full"),
        ("dpo.train_layers", dpo.train_layers or 0, model, "dpo" in methods),
        ("reward.layer", reward.layer, trunk, not trunk.scores),
        ("reward.train_layers", reward.train_layers, trunk, trunk.scores and reward.trunk != "frozen"),
    ):
        if matters and base.layers is not None and layers > base.layers:
            yield f"{setting} {layers}: the model has {base.layers} layers; set it to at most that"
    unknown = sorted(set(ppo.lora_targets or ()) - set(model.maps))
    if unknown and model.maps and "ppo" in methods and ppo.trains == "lora":
        yield f"ppo.lora_targets: no map of the model is named {', '.join(unknown)}; it has {', '.join(model.maps)}"


def _looked_at(model: Model, section: str, *, fetch: bool) -> Facts | None:
    """Load a base without its weights and try its chat template; None when it is not here and not to be fetched."""
    from rrlhf.models.adapters import adaptable
    from rrlhf.models.load import ModelError, load_base
    from rrlhf.models.text import RefusedError, Texts

    try:
        language = load_base(model, weights=False, fetch=fetch, reward_model=section != "model")
    except ModelError as error:
        return Facts(problems=[f"{section}.base {line}" for line in str(error).splitlines()])
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and isinstance(base_location(model, section), str) and not fetch:
            return None
        return Facts(problems=[f"{section}.base {model.base}: {str(error).splitlines()[0]}"])
    problems: list[str] = []
    notes = [*language.notes]
    try:
        if language.score is None:
            Texts(language, model).prompt(QUESTION)
            notes += _unmarked(language)
        else:
            Texts(language, model).conversation(QUESTION, "An answer.")
    except RefusedError as error:
        told = f"a user's turn ({error.said})"
        if model.system_prompt is not None:
            told = f"a system turn ({error.said}); set model.system_prompt to null"
        problems.append(f"{section}.base {model.base}: its chat template refuses {told}")
    except ValueError as error:
        problems.append(f"{section}.{error}")
    notes += _without_system(language) if section != "model" else ()  # rows that the policy's refuses are left out
    notes = [f"{section}.base {model.base}: {note}" for note in notes]
    return Facts(problems, notes, language.layers, adaptable(language.network), language.score is not None)


def _without_system(language: LanguageModel) -> Iterator[str]:
    """Say when a chat template refuses system turns."""
    from rrlhf.models.text import RefusedError, render

    try:
        render(language, [Message(role="system", content="Be kind."), *QUESTION])
    except RefusedError as error:
        yield f"its chat template takes no system turn ({error.said}): data that has one ends the stage that reads it"


def _unmarked(language: LanguageModel) -> Iterator[str]:
    """Say when a chat template does not tell the model where to begin."""
    asked, begun = (
        language.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=begin)
        for begin in (False, True)
    )
    if asked == begun:
        yield "its chat template writes nothing where the assistant begins (add_generation_prompt changes nothing)"

"""How text becomes tokens within the limits of the settings, and how much of it is cut."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from jinja2 import TemplateError

from rrlhf.config import Model
from rrlhf.models.load import LanguageModel
from rrlhf.progress import is_main_process, say
from rrlhf.types import Message, Metrics, Preference

PROMPTS, RESPONSES, PAIRS = "prompts", "responses", "pairs"


class NoRoomError(ValueError):
    """A prompt's system turn and headers alone are longer than prompts may be."""


class RefusedError(ValueError):
    """A chat template refuses a dialogue; `said` is what it says itself."""

    def __init__(self, said: str, model: str, turns: Sequence[Message]) -> None:
        roles = ", ".join(turn["role"] for turn in turns)
        super().__init__(
            f"the chat template of {model} refuses a dialogue of {roles}: {said}; leave such rows out of the data, or "
            "name another model"
        )
        self.said = said


class Texts:
    """The texts that one stage hands to a language model, as tokens; counts each text once.

    keeps_prompts: whether a prompt that comes again is worked out once, for the memory of all.
    """

    def __init__(self, language: LanguageModel, model: Model, *, keeps_prompts: bool = True) -> None:
        self._language, self._model, self._keeps = language, model, keeps_prompts
        self._asked: dict[bytes, tuple[list[Message], list[int]]] = {}  # prompts' turns and tokens, by their digest
        self._is_cut: dict[str, dict[bytes, bool]] = {}  # by kind and the text's digest

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return a prompt's tokens up to where the assistant begins, as the chat template writes them.

        Special tokens in what users wrote are plain text. A prompt that is longer than `model.prompt_tokens` loses its
        oldest turns, and then the beginning of its last one; the system turn and all headers stay.
        """
        return self._fitted(messages)[1]

    def response(self, text: str) -> list[int]:
        """Return a response's tokens without an end, cut to `model.response_tokens`."""
        tokens = encode(self._language, text)
        self._count(RESPONSES, _digest(text), len(tokens) > self._model.response_tokens)
        return tokens[: self._model.response_tokens]

    def answer(self, text: str) -> list[int]:
        """Return a response as the model would say it: with its end, unless the limit comes first."""
        return [*self.response(text), self._language.end][: self._model.response_tokens]

    def conversation(self, messages: Sequence[Message], text: str) -> list[int]:
        """Return a prompt with its response, each cut as it is alone, as the chat template writes the two together."""
        turns, tokens = self._fitted(messages)[0], self.response(text)
        said = decode(self._language, tokens) if self._is_cut[RESPONSES][_digest(text)] else text
        return render(self._language, [*turns, Message(role="assistant", content=said)], begin=False)

    def apart(self, pairs: Sequence[Preference], encoded: Callable[[str], list[int]]) -> list[Preference]:
        """Leave out pairs whose responses are the same when cut: they state no preference.

        encoded: `response` or `answer`. Raises ValueError when that leaves none.
        """
        different = []
        for pair in pairs:
            is_same = encoded(pair.chosen) == encoded(pair.rejected)
            self._count(PAIRS, _digest(json.dumps(pair)), is_same)
            different += [] if is_same else [pair]
        if pairs and not different:
            raise ValueError(
                f"cut to {self._model.response_tokens} tokens, the two responses of every pair are the same: raise "
                "response_tokens"
            )
        return different

    @property
    def cut(self) -> Metrics:
        """The share of each kind of text that was cut so far, 0 to 1; of pairs, those that `apart` left out."""
        return {f"cut_{kind}": sum(cut.values()) / len(cut) for kind, cut in self._is_cut.items()}

    def told(self, label: str) -> Metrics:
        """Say on the terminal what was cut so far, and return it."""
        limits = {PROMPTS: self._model.prompt_tokens, RESPONSES: self._model.response_tokens}
        for kind, cut in self._is_cut.items():
            if any(cut.values()) and is_main_process():
                what = f"cut to {limits[kind]} tokens" if kind in limits else "left out, the same when cut"
                share = f"{sum(cut.values()) / len(cut):.1%}"
                say(f"{label}: {sum(cut.values())} of {len(cut)} {kind} {what} ({share})")
        return self.cut

    def _fitted(self, messages: Sequence[Message]) -> tuple[list[Message], list[int]]:
        """Return a prompt's turns, as many as fit, and their tokens."""
        key = _digest(json.dumps(messages))
        if key not in self._asked:
            if not self._keeps:
                self._asked.clear()
            turns = [*messages]
            if self._model.system_prompt is not None and turns[0]["role"] != "system":
                turns = [Message(role="system", content=self._model.system_prompt), *turns]
            whole = self._rendered(turns)
            fits = self._fits(whole)
            self._asked[key] = (turns, whole) if fits else self._shortened(turns)
            self._count(PROMPTS, key, not fits)
        return self._asked[key]

    def _count(self, kind: str, key: bytes, is_cut: bool) -> None:
        self._is_cut.setdefault(kind, {})[key] = is_cut

    def _fits(self, tokens: list[int]) -> bool:
        return len(tokens) <= self._model.prompt_tokens

    def _rendered(self, turns: list[Message]) -> list[int]:
        return render(self._language, turns)

    def _shortened(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """Return the longest end of a dialogue that fits, and its tokens; its system turn stays.

        Raises NoRoomError when not even one character of the last turn fits.
        """
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        rest = turns[len(system) :]
        while len(rest) > 2:  # a question with its answer goes at a time
            rest = rest[2:]
            if self._fits(tokens := self._rendered([*system, *rest])):
                return [*system, *rest], tokens
        *before, last = rest

        def without(removed: int) -> list[Message]:
            end = Message(role=last["role"], content=last["content"][removed:])
            return [*system, *before, end]

        most = len(last["content"]) - 1
        shortest = bisect_left(range(most), True, key=lambda n: self._fits(self._rendered(without(n))))
        kept = without(shortest)
        if not self._fits(tokens := self._rendered(kept)):
            raise NoRoomError(
                f"prompt_tokens {self._model.prompt_tokens} leaves no room for a prompt: the chat template with its "
                f"system turn and one character takes {len(tokens)} tokens; raise it, or shorten the system turn"
            )
        return kept, tokens


def most_cut(cuts: Iterable[Mapping[str, float]]) -> Metrics:
    """Return the largest share of each kind of text that one of several readers cut."""
    most: Metrics = {}
    for cut in cuts:
        most |= {kind: max(share, most.get(kind, 0.0)) for kind, share in cut.items()}
    return most


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def render(language: LanguageModel, turns: Sequence[Message], *, begin: bool = True) -> list[int]:
    """Return the tokens of a dialogue, and of where the assistant begins; what users wrote is no special token.

    Raises RefusedError where the chat template does.
    """
    try:
        tokens: list[int] = language.tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=begin, sanitize_control_tokens=True, return_dict=False
        )
    except TemplateError as error:
        raise RefusedError(str(error), language.network.name_or_path, turns) from None
    return tokens


def encode(language: LanguageModel, text: str) -> list[int]:
    """Return a text's tokens; nothing in it is read as a special token."""
    encoded = language.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def decode(language: LanguageModel, tokens: list[int]) -> str:
    """Return the text of response tokens, without the end of sequence."""
    return str(language.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

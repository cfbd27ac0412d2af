"""What a tokenizer has to have: a chat template that prints the same every day, and tokens that end a response."""

import json
import re
from collections.abc import Iterator
from datetime import date
from typing import Any

# Of a tokenizer that brings none.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PRINTED_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def tokenizer_problems(network: Any, tokenizer: Any) -> Iterator[str]:
    """Yield what of a tokenizer does not fit its network."""
    rows, last = network.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if last >= rows:
        yield (
            f"its tokenizer has ids up to {last}, its embeddings {rows} rows: call resize_token_embeddings, train the "
            "new rows, and save the model again"
        )
    if tokenizer.eos_token_id is None:
        yield "its tokenizer has no end-of-sequence token"


def pin_date(tokenizer: Any, day: date) -> list[str]:
    """Have a chat template print this day instead of today's, in place: a prompt must not depend on the calendar."""
    template = tokenizer.get_chat_template()  # of several by name, the one for chats
    fixed = PRINTED_DATE.sub(lambda found: json.dumps(day.strftime(found[2])), template)
    if "strftime_now(" in fixed:
        return ["its chat template prints the time in a way that cannot be pinned; put a fixed date into the template"]
    tokenizer.chat_template = fixed
    return []


def ends(network: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response, first the one that the chat template writes behind it."""
    listed = network.generation_config.eos_token_id
    known = listed if isinstance(listed, list) else [listed]
    written = _written_end(tokenizer)
    return [*dict.fromkeys(end for end in (written, *known, tokenizer.eos_token_id) if end is not None)]


def _written_end(tokenizer: Any) -> int | None:
    """Return the first special token that the chat template writes behind a response; None where it writes none."""
    said = "A plain answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": said}]
    _, _, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((token for token in tokens if token in special), None)

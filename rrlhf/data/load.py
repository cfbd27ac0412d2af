"""Preference data from files and from the hub, checked row by row, and split by prompt.

Nothing is dropped in silence: a bad row is rejected by a named rule (rrlhf/data/rows.py) with its file and
line, and too many of them fail the stage. What a row has besides the columns of its format is kept with it, for reward
functions. Blank lines are ignored.
"""

import hashlib
import itertools
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from rrlhf.data.files import hub_rows, require_columns, rows_of, source_files
from rrlhf.data.rows import FIXES, FORMATS, Format, Row, RowError, normalised
from rrlhf.types import SUMMARY, Json, Message, Preference

Place = tuple[str, int]  # file and line, or row
EXAMPLES = 10  # of bad rows in an error
Found = TypeVar("Found")


class Rejected(NamedTuple):
    """A row that breaks a rule, and where it stands: its line in .jsonl, .csv and .tsv, its row elsewhere, from 1."""

    file: str
    line: int
    rule: str
    detail: str


Good = tuple[Preference, dict[str, Json]]  # a row, and what it has beside the columns of its format


def read_preferences(
    source: str,
    *,
    format: str,
    max_rejected: float,
    limit: int | None,
    revision: str | None = None,
    config: str | None = None,
    split: str | None = None,
    check: Callable[[list[Message]], object] = bool,
    rejected: list[Rejected],
) -> Iterator[Good]:
    """Yield the first `limit` good rows of files or of a hub data set, in order; add those that are bad to `rejected`.

    check: raises RowError for a prompt that the model cannot be asked.
    revision, config, split: of a data set on the hub; without a revision, `source` names files. Raises ValueError when
    the source cannot be read, and after the last row when it lacks a column, holds no good row, or when more than the
    share `max_rejected` of the rows read is bad.
    """
    layout, good, names = FORMATS[format], 0, dict[str, None]()
    if revision is None:
        rows = rows_of(source_files(source), layout)
    else:
        rows = hub_rows(source, layout, revision=revision, config=config, split=split)
    for one in good_rows(rows, rejected, names, _preference(layout, check)):
        yield one
        good += 1
        if good == limit:
            break
    told = source if revision is None else f"{source}@{revision}"
    refuse_bad_rows(told, rejected, good, names, layout, max_rejected)


def further_columns(folder: Path) -> list[str]:
    """Return the columns that a data set's rows have for reward functions, whichever of its tables they are in."""
    summary = folder / SUMMARY
    found: list[str] = json.loads(summary.read_bytes()).get("columns", []) if summary.is_file() else []
    return found


@cache
def columns_to_hand_on(source: str, format: str, wanted: frozenset[str], digest: str) -> frozenset[str]:
    """Return the columns beside those of its format that files have, read no further than a good row and all wanted.

    digest: of the content, so that a run that looks twice reads once. Raises ValueError when there is no good row.
    """
    layout, rejected, names = FORMATS[format], list[Rejected](), dict[str, None]()
    rows = rows_of(source_files(source), layout)
    first = next(good_rows(rows, rejected, names, _preference(layout)), None)
    refuse_bad_rows(source, rejected, int(first is not None), names, layout, 1.0)
    found = set(first[1]) if first else set()
    while not wanted <= found and (one := next(rows, None)):
        found |= _further(one[2], layout).keys() if not isinstance(one[2], RowError) else set()
    return frozenset(found)


def prompt_hash(prompt: list[Message]) -> str:
    """Return the sha256 of what counts as the same prompt: roles and texts, whatever their case, width or spacing."""
    return _sha256([[message["role"], normalised(message["content"])] for message in prompt]).hex()


def split_by_prompt(prompts: Sequence[list[Message]], shares: Mapping[str, float], seed: int) -> list[str]:
    """Return for every prompt the name of its split, which depends on the prompt, the shares and the seed alone.

    sha256("seed:prompt_hash") is a position in [0, 1), compared with the cumulated shares, so rows of one prompt
    never part, and adding rows never moves others. Raises ValueError unless the shares are in [0, 1] and sum to 1.
    """
    if not all(0 <= share <= 1 for share in shares.values()) or not abs(math.fsum(shares.values()) - 1) <= 1e-9:
        raise ValueError(f"shares {dict(shares)} must lie in [0, 1] and sum to 1")
    names = list(shares)
    cumulated = list(itertools.accumulate(shares.values()))
    edges = [edge / cumulated[-1] for edge in cumulated]  # the last one exactly 1, whatever was rounded
    return [names[bisect_right(edges, _position(f"{seed}:{prompt_hash(prompt)}"))] for prompt in prompts]


def _position(key: str) -> float:
    """Return a number in [0, 1) from the leading 53 bits of a digest: all that a float can hold without rounding."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 11) / 2**53


def good_rows(
    rows: Iterator[tuple[str, int, Row | RowError]],
    rejected: list[Rejected],
    names: dict[str, None],
    read: Callable[[Row, Place], Found],
) -> Iterator[Found]:
    """Yield what `read` makes of rows; add those that it refuses to `rejected`, and the columns of all to `names`."""
    for file, line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            names |= dict.fromkeys(row)
            found = read(row, (file, line))
        except RowError as error:
            rejected.append(Rejected(file, line, error.rule, error.detail))
        else:
            yield found


def _preference(layout: Format, check: Callable[[list[Message]], object] = bool) -> Callable[[Row, Place], Good]:
    seen: dict[bytes, Place] = {}

    def read(row: Row, place: Place) -> Good:
        preference = layout.read(row)
        check(preference.prompt)
        refuse_repetition(preference.prompt, [preference.chosen], [preference.rejected], place, seen)
        return preference, _further(row, layout)

    return read


def _further(row: Row, layout: Format) -> dict[str, Json]:
    """Return what a row has beside the columns of its format, less what JSON cannot say (bytes, dates)."""
    rest = {name: value for name, value in row.items() if name not in layout.needed + layout.optional}
    return {name: value for name, value in rest.items() if value is not None and _is_json(value)}  # type: ignore[misc]


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def refuse_repetition(
    prompt: list[Message], chosen: Sequence[str], rejected: Sequence[str], place: Place, seen: dict[bytes, Place]
) -> None:
    """Reject a row that repeats or contradicts an earlier good row; the earlier one stays. Notes the row in `seen`."""
    asked, better, worse = prompt_hash(prompt), [*map(normalised, chosen)], [*map(normalised, rejected)]
    same, swapped = _sha256([asked, better, worse]), _sha256([asked, worse, better])
    if same in seen:
        raise RowError("duplicate", f"same as {_told(seen[same], place)}")
    if swapped in seen:
        raise RowError(
            "conflicting_label", f"{_told(seen[swapped], place)} prefers the other; this later row is rejected"
        )
    seen[same] = place


def _told(place: Place, seen_from: Place) -> str:
    return f"line {place[1]}" if place[0] == seen_from[0] else f"{place[0]}:{place[1]}"


def refuse_bad_rows(
    source: str,
    rejected: Sequence[Rejected],
    good: int,
    names: dict[str, None],
    layout: Format,
    max_rejected: float,
    setting: str = "max_rejected",
) -> None:
    """Raise ValueError when no row has a column, more than a share of the rows is bad, or none is good.

    It tells rules, examples and what to do. names: the columns that some row has. setting: by which the share is set.
    """
    if names:
        no_prompt = not good and "conversations" not in names
        lacks_prompt = no_prompt and any(row.rule == "no_prompt" for row in rejected)
        require_columns(source, [*names], layout, prompt=lacks_prompt)
    bad, total = len(rejected), len(rejected) + good
    if not total:
        raise ValueError(f"{source}: there is no row; name another file, or fill this one")
    if good and bad / total <= max_rejected:
        return
    share = f"{bad} of {total} rows are bad ({bad / total:.1%}; {setting} allows {max_rejected:.1%})"
    counts = Counter(row.rule for row in rejected).most_common()
    lines = [
        f"{source}: {share if good else f'none of {total} rows is good'}",
        *(f"  {count} {rule}: {FIXES[rule]}" for rule, count in counts),
        "for example",
        *(f"  {row.file}:{row.line}: {row.rule}: {row.detail}" for row in rejected[:EXAMPLES]),
        f"mend the rows, check that the format fits{f', or raise {setting}' if good else ''}",
    ]
    raise ValueError("\n".join(lines))


def _sha256(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()

"""Preference data from files and from the hub, checked row by row, and split by prompt.

Nothing is dropped in silence: a bad row is rejected by a named rule (rrlhf/preferences/rows.py) with its file and
line, and too many of them fail the stage. Columns that the format does not name are ignored, as are blank lines.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.preferences.rows import FIXES, FORMATS, Format, Row, RowError, Scores, normalised
from rrlhf.types import Message, Preference

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[int, Row | RowError]]  # with the line (.jsonl, .csv) or the row (others), counted from 1

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ROWS_PER_BATCH = 1024


class Rejected(NamedTuple):
    """A row that breaks a rule, and where it stands: its line in .jsonl and .csv, its row elsewhere, from 1."""

    file: str
    line: int
    rule: str
    detail: str


class Loaded(NamedTuple):
    """Good rows in the order of the source, the scores of (chosen, rejected) where it has them, and bad rows."""

    preferences: list[Preference]
    scores: list[Scores | None]
    rejected: list[Rejected]


def load_preferences(
    source: str, *, revision: str | None, format: str, max_rejected: float, limit: int | None
) -> Loaded:
    """Return the first `limit` good rows of a file or of a hub data set, and all rows rejected on the way.

    Raises ValueError when the source cannot be read, lacks a column, holds no good row, or when more than the share
    `max_rejected` of the rows read is bad.
    """
    layout = _layout(format)
    name, rows = open_rows(source, revision, layout)
    loaded = Loaded([], [], [])
    columns: dict[str, None] = {}
    lines_seen: dict[str, int] = {}
    for line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            columns |= dict.fromkeys(row)
            preference, scores = layout.read(row)
            refuse_repetition(preference, line, lines_seen)
        except RowError as error:
            loaded.rejected.append(Rejected(name, line, error.rule, error.detail))
            continue
        loaded.preferences.append(preference)
        loaded.scores.append(scores)
        if len(loaded.preferences) == limit:
            break
    if columns:
        require_columns(name, list(columns), layout)
    _refuse_bad_data(name, loaded, max_rejected)
    return loaded


def prompt_hash(prompt: list[Message]) -> str:
    """Return the sha256 of what counts as the same prompt: roles and texts, whatever their case, width or spacing."""
    return _sha256([[message["role"], normalised(message["content"])] for message in prompt])


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


def _layout(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}{_close_match(format, FORMATS)}; there are {', '.join(FORMATS)}")
    return FORMATS[format]


def refuse_repetition(preference: Preference, line: int, lines_seen: dict[str, int]) -> None:
    """Reject a row that repeats or contradicts an earlier good row; the earlier one stays."""
    prompt, chosen, rejected = prompt_hash(preference.prompt), *map(normalised, preference[1:])
    same, swapped = _sha256([prompt, chosen, rejected]), _sha256([prompt, rejected, chosen])
    if same in lines_seen:
        raise RowError("duplicate", f"same as line {lines_seen[same]}")
    if swapped in lines_seen:
        raise RowError("conflicting_label", f"line {lines_seen[swapped]} prefers the other; this later row is rejected")
    lines_seen[same] = line


def require_columns(file: str, found: list[str], layout: Format) -> None:
    """Raise ValueError naming every column that a format needs and a source lacks."""
    missing = [name for name in layout.fields if name not in found]
    if missing:
        wanted = ", ".join(f"{name!r}{_close_match(name, found)}" for name in missing)
        raise ValueError(f"{file}: no column {wanted}; found {found[:20]}; rename the columns or change the format")


def _refuse_bad_data(file: str, loaded: Loaded, max_rejected: float) -> None:
    bad = len(loaded.rejected)
    total = bad + len(loaded.preferences)
    if not total:
        raise ValueError(f"{file}: there is no row")
    if loaded.preferences and bad / total <= max_rejected:
        return
    counts = Counter(row.rule for row in loaded.rejected).most_common()
    raise ValueError(
        f"{file}: {bad} of {total} rows are bad ({bad / total:.1%}; max_rejected allows {max_rejected:.1%})\n"
        + "".join(f"  {count} {rule}: {FIXES[rule]}\n" for rule, count in counts)
        + "for example\n"
        + "".join(f"  {row.file}:{row.line}: {row.rule}: {row.detail}\n" for row in loaded.rejected[:3])
        + "mend the rows, check that the format fits, or raise max_rejected"
    )


def open_rows(source: str, revision: str | None, layout: Format) -> tuple[str, Rows]:
    """Return the name of the source for messages, and its rows."""
    path = Path(source).expanduser()
    if not path.exists():
        return _open_hub(source, revision, layout)
    kind = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])
    if kind == ".parquet":
        return source, _parquet_rows(path, layout)
    readers = {".jsonl": _jsonl_rows, ".jsonl.gz": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.is_dir() or kind not in readers:
        raise ValueError(f"{source}: name one file that ends with {', '.join(readers)} or .parquet")
    return source, readers[kind](path)


def _open_hub(source: str, revision: str | None, layout: Format) -> tuple[str, Rows]:
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source!r}: no such file, and not a hub id (owner/name)")
    if not revision:
        raise ValueError(
            f"{source!r}: no such file. If it is a hub id, name its commit as revision: unpinned data cannot be "
            "reproduced"
        )
    return f"{source}@{revision}", _hub_rows(source, revision, layout)


def _jsonl_rows(path: Path) -> Rows:
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, content in enumerate(file, start=1):
                if content.strip():
                    yield line, _json_object(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip after line {line} ({error}); fetch the file again") from error


def _json_object(content: bytes) -> Row | RowError:
    try:
        value = json.loads(content.decode("utf-8-sig"))  # the byte order mark that some editors write is no content
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"byte {error.start + 1} of the line is 0x{content[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        return RowError("bad_json", str(error))
    return _object(value)


def _object(value: object) -> Row | RowError:
    return value if isinstance(value, dict) else RowError("not_an_object", f"the row is a {type(value).__name__}")


def _json_rows(path: Path) -> Rows:
    """Yield the items of a list. The file is one document: where it is broken, none of it can be trusted."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not one JSON document in UTF-8 ({error}); if each line is one, use .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list of objects")
    for row, value in enumerate(rows, start=1):
        yield row, _object(value)


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default would stop before too_long can say why
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        first = 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a column name appears twice in {header}")
            first = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield first, _csv_object(header, cells)
                first = reader.line_num + 1
        except csv.Error as error:  # what follows a broken quote cannot be told apart into rows
            raise ValueError(f"{path}:{first}: broken quoting in the row that starts here ({error})") from error


def _csv_object(header: list[str], cells: list[str]) -> Row | RowError:
    if found := _ESCAPED_BYTE.search("".join(cells)):
        return RowError("not_utf8", f"the row has the byte 0x{ord(found[0]) - 0xDC00:02x}")
    if len(cells) != len(header):
        return RowError("bad_csv", f"{len(cells)} cells under {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path, layout: Format) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            require_columns(str(path), file.schema_arrow.names, layout)
            yield from _arrow_rows(file.iter_batches(_ROWS_PER_BATCH, columns=list(layout.fields)))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}); fetch it again") from error


def _hub_rows(source: str, revision: str, layout: Format) -> Rows:
    import datasets

    dataset = datasets.load_dataset(source, revision=revision, split=layout.split)
    require_columns(f"{source}@{revision}", dataset.column_names, layout)
    columns = dataset.select_columns(list(layout.fields)).with_format("arrow")
    yield from _arrow_rows(columns.iter(_ROWS_PER_BATCH))


def _arrow_rows(batches: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    yield from enumerate(itertools.chain.from_iterable(map(_batch_rows, batches)), start=1)


def _batch_rows(batch: pa.Table | pa.RecordBatch) -> Iterable[Row | RowError]:
    try:
        rows: list[Row] = batch.to_pylist()
    except UnicodeDecodeError:
        return [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    return rows


def _arrow_row(single: pa.Table | pa.RecordBatch) -> Row | RowError:
    try:
        row: Row = single.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError("not_utf8", str(error))
    return row


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _close_match(word: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean {match!r}?)" for match in difflib.get_close_matches(word, known, n=1))

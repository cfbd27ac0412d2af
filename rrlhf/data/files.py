"""Where rows come from: a file, the shards in a folder, the files that match a pattern, or a data set on the hub."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rrlhf.config import Prepare
from rrlhf.data.rows import SCORES, Format, Row, RowError
from rrlhf.located import ParamsError
from rrlhf.memo import Memo
from rrlhf.models.sources import files_digest, path_digest, pinned_commit

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[int, Row | RowError]]  # with the line (.jsonl, .csv, .tsv) or the row (others), from 1

TEXT = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # behind these endings
BINARY = (".parquet", ".arrow")
ENDINGS = f"{', '.join(TEXT)} (also with {' or '.join(COMPRESSED)}), {' or '.join(BINARY)}"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PATTERN = re.compile(r"[*?[]")
_BESIDE_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # by the hub's library
_SPLIT = re.compile(r"(?<![a-z])(train|test|valid|val|dev|eval)(?:ing|idation|uation)?(?![a-z])")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
_ROWS_PER_BATCH = 1024


def is_hub_id(source: str) -> bool:
    """Whether a source is the name of a data set on the hub (owner/name), and nothing that should lie here."""
    path = Path(source).expanduser()
    return _HUB_ID.fullmatch(source) is not None and _kind(path) is None and not path.exists()


def source_files(source: str) -> list[Path]:
    """Return the files with rows that a source names, in the order of their names.

    Raises ValueError when there is none, and when they are not of one kind or not of one split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _shards(path)
    if path.exists():
        found = [path]
    elif _PATTERN.search(source):
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = sorted(match for match in matches if match.is_file() and not match.name.startswith("."))
    else:
        raise ValueError(f"{source!r}: no such file or folder")
    if not found:
        raise ValueError(f"{source}: no file matches")
    if unknown := [str(each) for each in found if _kind(each) is None]:
        raise ValueError(f"{', '.join(unknown[:3])}: name files that end with {ENDINGS}")
    return _of_one_kind(source, found)


def source_digest(prepare: Prepare, memo: Memo) -> str:
    """Return what identifies the source data's content. Raises ParamsError when it cannot be had."""
    source = prepare.source
    if source == "written":
        return "written"
    if is_hub_id(source):
        return f"hub:{source}@{pinned_commit(source, prepare.revision, setting='prepare.revision', kind='dataset')}"
    try:
        files = source_files(source)
    except ValueError as error:
        raise ParamsError(f"prepare.source {error}") from None
    of_the_hub = [name for name in ("revision", "config", "split") if getattr(prepare, name) is not None]
    if of_the_hub:
        told = [
            f"prepare.{name} belongs to a hub data set, and {source} lies here: set it to null" for name in of_the_hub
        ]
        raise ParamsError("\n".join(told))
    if len(files) == 1 and Path(source).expanduser().is_file():
        return path_digest(files[0], memo)
    return files_digest(files, Path(os.path.commonpath([path.parent for path in files])), memo)


def rows_of(files: Iterable[Path], layout: Format) -> Iterator[tuple[str, int, Row | RowError]]:
    """Yield the rows of files, each with its file and its line there. Raises ValueError where a file is broken."""
    for path in files:
        for line, row in _file_rows(path, layout):
            yield str(path), line, row


def hub_rows(
    source: str, layout: Format, *, revision: str, config: str | None, split: str | None
) -> Iterator[tuple[str, int, Row | RowError]]:
    """Yield the rows of a data set on the hub, as it was at a commit. Raises ValueError when it cannot be had."""
    import datasets

    name = f"{source}@{revision}"
    try:
        dataset = datasets.load_dataset(source, name=config, revision=revision, split=split or layout.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name}: cannot be had ({' '.join(str(error).split())}); check prepare.source, revision, config and split "
            f"({split or layout.split!r} here)"
        ) from error
    require_columns(name, dataset.column_names, layout)
    for row, content in _arrow_rows(dataset.with_format("arrow").iter(_ROWS_PER_BATCH)):
        yield name, row, content


def require_columns(source: str, found: Sequence[str], layout: Format, *, prompt: bool = False) -> None:
    """Raise ValueError naming every column that a format needs and a source lacks.

    prompt: whether its rows need a prompt, too.
    """
    missing = [name for name in dict.fromkeys((*(["prompt"] if prompt else []), *layout.needed)) if name not in found]
    if missing:
        wanted = ", ".join(f"{name!r}{close_match(name, found)}" for name in missing)
        more = ", or write chosen and rejected as whole dialogues" if prompt else ""
        raise ValueError(
            f"{source}: no column {wanted}; found {[*found][:20]}; rename the columns or change the format{more}"
        )


def close_match(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that an unknown one resembles, if any does."""
    return "".join(f" (did you mean {match!r}?)" for match in difflib.get_close_matches(word, known, n=1))


def _shards(folder: Path) -> list[Path]:
    """Return the files with rows that lie in a folder itself."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    found = [path for path in inside if path.is_file() and _kind(path) and path.name not in _BESIDE_ROWS]
    if not found:
        below = ", ".join(path.name for path in inside if path.is_dir())
        hint = f"; name one of the folders in it: {below}" if below else ""
        raise ValueError(f"{folder}: no file in it ends with {ENDINGS}{hint}")
    splits = list(dict.fromkeys(match[1] for path in found if (match := _SPLIT.search(path.name.lower()))))
    if len(splits) > 1:
        raise ValueError(
            f"{folder}: its files are of more than one split ({', '.join(splits)}); name those of one by a pattern, "
            f"such as {folder}/{splits[0]}*, or all by {folder}/*"
        )
    return _of_one_kind(str(folder), found)


def _of_one_kind(source: str, files: list[Path]) -> list[Path]:
    kinds = sorted({str(_kind(path)) for path in files})
    if len(kinds) > 1:
        raise ValueError(
            f"{source}: {' and '.join(kinds)} files; name those of one kind by a pattern that ends with *{kinds[0]}"
        )
    return files


def _kind(path: Path) -> str | None:
    """Return how a file's rows are written, by its name: ".csv" for a.csv and a.csv.gz; None for what is not read."""
    name = path.name.lower()
    unpacked = next((name.removesuffix(packed) for packed in COMPRESSED if name.endswith(packed)), name)
    kind = Path(unpacked).suffix
    return kind if kind in TEXT or (kind in BINARY and unpacked == name) else None


def _file_rows(path: Path, layout: Format) -> Rows:
    line = 0
    try:
        for line, row in _READERS[str(_kind(path))](path, layout):
            yield line, row
    except OSError as error:
        if getattr(error, "errno", None):
            raise  # it could not be read at all
        raise ValueError(f"{path}: broken {path.suffix} after line {line} ({error}); fetch the file again") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed."""
    if path.suffix.lower() in COMPRESSED:
        import pyarrow as pa

        with pa.input_stream(str(path), compression=COMPRESSED[path.suffix.lower()]) as stream:
            yield io.BufferedReader(stream)
    else:
        with path.open("rb") as file:
            yield file


def _jsonl_rows(path: Path, layout: Format) -> Rows:
    with _opened(path) as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                yield line, _json_object(content)


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


def _json_rows(path: Path, layout: Format) -> Rows:
    """Yield the items of a list. The file is one document: where it is broken, none of it can be trusted."""
    try:
        with _opened(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not one JSON document in UTF-8 ({error}); if each line is one, use .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list of objects")
    for row, value in enumerate(rows, start=1):
        yield row, _object(value)


def _cell_rows(path: Path, layout: Format, *, delimiter: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default would stop before too_long can say why
    with _opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        first = 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a column name appears twice in {header}")
            if header:
                require_columns(str(path), header, layout)
            first = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield first, _cells_object(header, cells)
                first = reader.line_num + 1
        except csv.Error as error:  # what follows a broken quote cannot be told apart into rows
            raise ValueError(f"{path}:{first}: broken quoting in the row that starts here ({error})") from error


def _cells_object(header: list[str], cells: list[str]) -> Row | RowError:
    if found := _ESCAPED_BYTE.search("".join(cells)):
        return RowError("not_utf8", f"the row has the byte 0x{ord(found[0]) - 0xDC00:02x}")
    if len(cells) != len(header):
        return RowError("bad_csv", f"{len(cells)} cells under {len(header)} columns")
    return {name: _number(cell) if name in SCORES else cell for name, cell in zip(header, cells, strict=True)}


def _number(cell: str) -> float | str | None:
    """Return a cell as a number; None where it is empty, and itself where it is none."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _columnar_rows(path: Path, layout: Format) -> Rows:
    """Yield the rows of a file in parquet or in Arrow's IPC format."""
    import pyarrow as pa

    try:
        with _batches(path) as (columns, batches):
            require_columns(str(path), columns, layout)
            yield from _arrow_rows(batches)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        if getattr(error, "errno", None):
            raise
        if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{path}: a text in it is not UTF-8 ({error}); write the file again") from error
        raise ValueError(f"{path}: not a whole {path.suffix[1:].lower()} file ({error}); fetch it again") from error


@contextmanager
def _batches(path: Path) -> Iterator[tuple[list[str], Iterable[pa.RecordBatch]]]:
    """Open a file; yield its columns and its rows in parts. Arrow's are files, or the hub's streams."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _kind(path) == ".parquet":
        with pq.ParquetFile(path) as file:
            yield file.schema_arrow.names, file.iter_batches(_ROWS_PER_BATCH)
    else:
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
            yield reader.schema.names, reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))


def _arrow_rows(batches: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    starts = ((batch, start) for batch in map(_valid, batches) for start in range(0, batch.num_rows, _ROWS_PER_BATCH))
    parts = (batch.slice(start, _ROWS_PER_BATCH).to_pylist() for batch, start in starts)
    yield from enumerate(itertools.chain.from_iterable(parts), start=1)


def _valid(batch: pa.Table | pa.RecordBatch) -> pa.Table | pa.RecordBatch:
    """Return a batch whose offsets lie inside of its buffers: reading beyond them would end the process."""
    batch.validate(full=True)
    return batch


_READERS: dict[str, Callable[[Path, Format], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": partial(_cell_rows, delimiter=","),
    ".tsv": partial(_cell_rows, delimiter="\t"),
    ".parquet": _columnar_rows,
    ".arrow": _columnar_rows,
}

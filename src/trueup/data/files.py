"""Rows of files: JSONL, JSON, CSV and Parquet, .gz of these; folders and Hub names through the `datasets` library.

A row comes with its place ("line 3", "row 3"), so that who cannot read it can say where it stands. What a row means is
not known here (`readers`).
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import logging
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BeforeValidator, Field

from trueup.config import Config, named, parse
from trueup.records import UserError, is_local

Row = dict[str, Any]
NUMBERS = {"label", "margin", "weight", "gold_margin"}
FLAGS = {"chosen_ended", "rejected_ended"}
"""Columns that are no text: what a cell of a CSV file is turned into where it can be."""


class Source(Config):
    """One of several data sets, or one that needs more than its path."""

    path: str
    """A file, a folder that the `datasets` library reads, or a Hub name."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often an epoch sees each of its rows: 1 once, 2 twice, 0.5 a half of them, drawn by the seed."""
    categories: tuple[str, ...] = named(())
    """Only rows of these (column `category`), such as people's comparisons of some and an AI's of others; else all."""
    name: str | None = named(None)
    data_dir: str | None = named(None)
    split: str = named("train")
    """`name`, `data_dir` and `split` are those of `datasets.load_dataset`; a file has none of them."""

    @property
    def label(self) -> str:
        """What tells it from the others of a mix."""
        told = [str(getattr(self, k)) for k in LIBRARY if k in self.model_fields_set]
        return " ".join([self.path, *told, *self.categories])


LIBRARY = ("name", "data_dir", "split")


def _listed(value: Any) -> Any:
    if isinstance(value, str | Path):
        return str(value)
    items = value if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str | Mapping | Source) for item in items):
        raise ValueError("expected a path, or a list of paths and of {path: ..., weight: ...}")
    return tuple(
        item if isinstance(item, Source) else parse(Source, {"path": item} if isinstance(item, str) else item, where)
        for item, where in ((item, f"data set {i}") for i, item in enumerate(items, 1))
    )


Data = Annotated[str | tuple[Source, ...], BeforeValidator(_listed)]
"""A config's data: a path, or several with their weights: [a.jsonl, {path: b.jsonl, weight: 0.5}]."""


def sources(data: Any) -> list[Source]:
    """What a key of type `Data` holds, as a list."""
    try:
        listed = _listed(data)
    except ValueError as error:
        raise UserError(f"{data}: {error}") from None
    return [Source(path=listed)] if isinstance(listed, str) else list(listed)


def raw_rows(data: str | Path | Source) -> Iterator[tuple[str, Row]]:
    """(place, row). Raises UserError naming the file, and the line where there is one."""
    source = data if isinstance(data, Source) else Source(path=str(data))
    path = Path(source.path)
    plain = path.name.lower().removesuffix(".gz")
    kind = Path(plain).suffix
    if path.is_dir() or not (path.exists() or kind in READERS or is_local(source.path)):
        yield from _library(source)
        return
    if not path.exists():
        raise UserError(f"{path}: no such file" + ("" if kind in READERS else " (a Hub name is owner/name)"))
    if kind not in READERS:
        raise UserError(f"{path}: unknown kind of file; expected {', '.join(READERS)}, or one of these with .gz")
    if given := source.model_fields_set & set(LIBRARY):
        raise UserError(f"{path}: a file has no {' or '.join(map(repr, sorted(given)))}; folders and Hub names do")
    try:
        opened: Any = gzip.open if plain != path.name.lower() else open
        with opened(path, "rb") as file:
            yield from READERS[kind](path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _jsonl(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            text = _text(path, line.rstrip(b"\r\n"), number)
            yield f"line {number}", _object(path, f"line {number}", _loads(path, text, number))


def _json(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """An array of objects; or an object a line, which many a .json file is (`datasets.Dataset.to_json` writes so)."""
    data = file.read()
    text = _text(path, data)
    if not text.lstrip().startswith("["):
        yield from _jsonl(path, io.BytesIO(data))
        return
    for number, row in enumerate(_loads(path, text), 1):
        yield f"row {number}", _object(path, f"row {number}", row)


def _csv(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """A header, then a record a line; chat columns hold JSON, or Python's own writing of it as pandas leaves it."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_text(path, file.read()), newline=""), strict=True)
    header: list[str] | None = None
    place = "line 1"
    try:
        for cells in reader:
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{path}, line 1: a column's name stands twice in the header")
            elif cells and len(cells) != len(header):
                raise UserError(f"{path}, {place}: {len(cells)} fields, but the header has {len(header)}")
            elif cells:
                row = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}
                yield place, {name: value for name, value in row.items() if value is not None}
            place = f"line {reader.line_num + 1}"  # where the next record begins: one may go over several lines
    except csv.Error as error:
        raise UserError(f"{path}, {place}: broken CSV: {error}") from None


def _cell(name: str, cell: str) -> Any:
    if name in NUMBERS | FLAGS and not cell.strip():
        return None
    if name in NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    if name in FLAGS:
        return {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
    if cell.lstrip().startswith("[") and "{" in cell:
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                return value
    return cell


def _parquet(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: not UTF-8 ({error.reason})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file: {one_line(error)}") from None


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _text(path: Path, data: bytes, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None


def _loads(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        raise UserError(f"{path}, line {number}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list a thousand deep
        raise UserError(f"{path}, line {line}: JSON that cannot be read: {error}") from None


def _object(path: Path, place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {place}: expected an object with columns, found {type(row).__name__}")
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise UserError(f"{path}, {place}: column {name!r} holds {half}, half a character") from None
    return row


def _library(source: Source) -> Iterator[tuple[str, Row]]:
    """A folder of files, a folder that `save_to_disk` wrote, or a data set of the Hub."""
    import datasets

    path = Path(source.path)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say of an error is in the error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if path.is_dir():
        datasets.disable_progress_bars()
    try:
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(source.path)
        else:
            found = datasets.load_dataset(source.path, source.name, data_dir=source.data_dir)
    except Exception as error:  # it raises what its readers and the network raise
        why = (
            error.__cause__ or error.__context__
            if isinstance(error, datasets.exceptions.DatasetGenerationError)
            else None
        )
        raise UserError(f"{source.path}: no data set could be loaded: {one_line(why or error)}") from None
    if isinstance(found, dict):
        split = source.split
        if "split" not in source.model_fields_set and split not in found and len(found) == 1:
            (split,) = found
        if split not in found:
            raise UserError(f"{source.path}: no split '{split}'; choose one by {{path: ..., split: {'|'.join(found)}}}")
        found = found[split]
    elif "split" in source.model_fields_set:
        raise UserError(f"{source.path}: holds one data set without splits, and no split '{source.split}'")
    for number, row in enumerate(found, 1):
        yield f"row {number}", row


def one_line(error: BaseException) -> str:
    """What went wrong without its stack of advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""Prompts from tables: parquet files, and datasets in Hugging Face's layout, by the libraries of the extra ``data``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leapalign.inputs.validation import UserError, brief
from leapalign.prompts.columns import prompt_column

ROWS_AT_ONCE = 1000
SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What ``datasets.save_to_disk`` writes beside its Arrow files."""


def parquet_prompts(path: Path) -> Iterator[tuple[str, object]]:
    """The column of prompts of a parquet file, each row with its place. Raises UserError where there is none."""
    pyarrow, parquet = _library("pyarrow", path), _library("pyarrow.parquet", path)
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = names[prompt_column(names, f"'{path}'")]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                for prompt in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path}, row {row},", prompt
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read parquet file '{path}' ({brief(error)}); check prompts.path") from None


def dataset_prompts(folder: Path) -> Iterator[tuple[str, object]]:
    """The column of prompts of a folder: saved by ``datasets.save_to_disk``, or of parquet files, by name.

    Raises UserError where there is none, and for several splits.
    """
    if any((folder / name).exists() for name in SAVED):
        yield from _saved(folder)
        return
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"folder '{folder}' holds neither a saved dataset nor parquet files; check prompts.path")
    for file in files:
        yield from parquet_prompts(file)


def _saved(folder: Path) -> Iterator[tuple[str, object]]:
    pyarrow, datasets = _library("pyarrow", folder), _library("datasets", folder)
    row = 0
    try:
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            raise UserError(f"'{folder}' has the splits {', '.join(found)}; name the folder of one")
        column = found.column_names[prompt_column(found.column_names, f"'{folder}'")]
        for batch in found.select_columns(column).iter(ROWS_AT_ONCE):
            for prompt in batch[column]:
                row += 1
                yield f"{folder}, row {row},", prompt
    except UserError:
        raise
    # What is wrong with the files' JSON arrives as these.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read dataset '{folder}' ({brief(error)}); check prompts.path") from None


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"reading '{path}' needs {name.partition('.')[0]}; install it with pip install 'leapalign[data]'"
        ) from None

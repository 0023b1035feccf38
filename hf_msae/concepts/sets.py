"""Concepts from a file: word lists, labelled examples, or rows of AxBench's sets.

One JSON object a line, or Parquet. With `name` and `words`, `positive` and `negative` it is a concept of its own, the
last two being lists of texts. Rows with `output_concept`, `output` and `category` are AxBench's (concept500 and its
kind): the outputs of category "positive" are the examples of their concept, those of category "negative" show none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_msae.concepts.evaluating import Concept, concepts_of_words
from hf_msae.concepts.examples import ConceptError
from hf_msae.concepts.scorers import Scorer

KEYS = {"name", "words", "positive", "negative"}
AXBENCH_KEYS = {"output_concept", "output", "category"}


def read_concepts(
    path: str | Path, texts: Sequence[str] = (), scorer: Callable[[str], Scorer] | None = None
) -> list[Concept]:
    """The concepts of a file.

    Args:
        path: of a .jsonl or .parquet file.
        texts: where examples of concepts that are given by words alone are looked for.
        scorer: makes the scorer of a concept from its name; by default texts are scored by words.

    Raises:
        ConceptError: there is no such file, or a row is none of these.
    """
    rows = _read_rows(Path(path).expanduser())
    if rows[0].keys() >= AXBENCH_KEYS:
        return _of_axbench(rows, path, scorer)
    found: list[Concept] = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row.get("name"), str) or not row["name"].strip() or row.keys() - KEYS:
            raise ConceptError(
                f"{where}: expected an object with a name, and words or positive and negative texts; got the keys "
                f"{', '.join(map(str, row))}."
            )
        words, positive, negative = (_texts(row, key, where) for key in ("words", "positive", "negative"))
        if positive and negative:
            by = None if scorer is None else scorer(row["name"])
            found.append(Concept(row["name"], positive, negative, tuple(words), by))
        elif words and not positive and not negative:
            found += concepts_of_words({row["name"]: words}, texts, scorer=scorer)
        else:
            raise ConceptError(f"{where}: {row['name']!r} needs words, or both positive and negative texts.")
    return found


def _texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = row.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ConceptError(f"{where}: {key} is a list of texts, got {value!r:.60}.")
    return value


def _of_axbench(
    rows: Sequence[Mapping[str, Any]], path: str | Path, scorer: Callable[[str], Scorer] | None
) -> list[Concept]:
    positive: dict[str, list[str]] = {}
    negative: list[str] = []
    for row in rows:
        if row.get("category") == "positive":
            positive.setdefault(str(row["output_concept"]), []).append(str(row["output"]))
        elif row.get("category") == "negative":
            negative.append(str(row["output"]))
    if not positive or not negative:
        raise ConceptError(f"{path} has AxBench's columns, but no rows of category positive, or none of negative.")
    return [
        Concept(name, texts, negative, (), None if scorer is None else scorer(name))
        for name, texts in positive.items()
    ]


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise ConceptError(
            f"Concepts are read from a .jsonl or .parquet file; {path} is "
            f"{'no such file' if path.suffix in ('.jsonl', '.parquet') else 'neither'}."
        )
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows: list[Any] = Dataset.from_parquet(str(path)).to_list()
    else:
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConceptError(f"{path}, line {number}, is no JSON: {error}.") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ConceptError(f"{path} holds no rows of concepts: expected one JSON object a line.")
    return rows

"""Rows of an evaluation's tables, for the terminal and for the HTML report.

A row is a method at a prefix. Where there are several SAEs of a method, or several splits of the labelled data, a cell
is their mean ± the standard deviation.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_msae.evaluation.metric import Evaluation, Table

Cells = Sequence[float | None]


@dataclass(frozen=True)
class Column:
    """One column of a table whose rows are methods at prefixes.

    Args:
        name: what stands above it.
        values: from an SAE's name and a prefix, its values there; several where there is one for each split.
        digits: behind the decimal point.
        scale: what values are multiplied with; 100 writes a fraction as a percentage.
    """

    name: str
    values: Callable[[str, int], Cells]
    digits: int = 3
    scale: float = 1.0


def write_cell(values: Cells, digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation, the mean of a single value, or a dash for none.

    Args:
        values: None counts as missing.
        digits: behind the decimal point.
        scale: what values are multiplied with.
    """
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def all_tables(evaluation: Evaluation) -> list[Table]:
    """The tables of every metric that was measured, in the order of the report.

    Args:
        evaluation: what was measured.
    """
    return [
        table for metric in evaluation.metrics for table in metric.tables(evaluation.results[metric.name], evaluation)
    ]


def field_at_prefix(found: Mapping[str, Iterable[Any]], field: str) -> Callable[[str, int], Cells]:
    """For a [`Column`], one field of what was found at a prefix.

    Args:
        found: by the SAE's name dataclasses with a `prefix`.
        field: of these dataclasses.
    """
    return lambda name, prefix: [vars(item)[field] for item in found[name] if item.prefix == prefix]


def table_by_prefix(evaluation: Evaluation, title: str, note: str, columns: Sequence[Column]) -> Table:
    """A table with a row for each method at each prefix. SAEs of a method are paired by the place of a prefix.

    Args:
        evaluation: whose methods and prefixes the rows are of.
        title: the heading.
        note: what the columns mean.
        columns: behind those with the SAE and the prefix.
    """
    rows = []
    for label, names in labelled_methods(evaluation).items():
        sizes = [evaluation.prefix_sizes[name] for name in names]
        for place in range(max(map(len, sizes))):
            at = [(name, of[place]) for name, of in zip(names, sizes, strict=True) if place < len(of)]
            prefixes = sorted({prefix for _, prefix in at})
            row = [label, "–".join(f"{prefix:,}" for prefix in {prefixes[0]: 0, prefixes[-1]: 0})]
            for column in columns:
                values = [value for name, prefix in at for value in column.values(name, prefix)]
                row.append(write_cell(values, column.digits, column.scale))
            rows.append(row)
    return Table(title, note, ["SAE", "prefix", *(column.name for column in columns)], rows)


def labelled_methods(evaluation: Evaluation, names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """The SAEs of each method, by what its rows are called: with the number of seeds where there are several.

    Args:
        evaluation: whose methods they are.
        names: of the SAEs to list; by default all.
    """
    methods = evaluation.names_by_method(names)
    return {method if len(of) == 1 else f"{method} ({len(of)} seeds)": of for method, of in methods.items()}

"""Rows and cells of tables, on numbers that are easy to check."""

from dataclasses import dataclass

import pytest

from hf_msae.evaluation.metric import Evaluation
from hf_msae.evaluation.tables import Column, field_at_prefix, labelled_methods, table_by_prefix, write_cell


@dataclass
class Found:
    prefix: int
    value: float | None


@pytest.fixture
def evaluation() -> Evaluation:
    """Two seeds of one method, whose last prefixes differ, and another method with one prefix."""
    sizes = {"a 0": [4, 16], "a 1": [4, 20], "b": [16]}
    return Evaluation({"a 0": "a", "a 1": "a", "b": "b"}, sizes)


@pytest.mark.parametrize(
    ("values", "digits", "scale", "cell"),
    [
        ([0.12345], 3, 1.0, "0.123"),
        ([1.0, 3.0], 2, 1.0, "2.00 ± 1.41"),
        ([None, 0.5, None], 1, 100.0, "50.0"),
        ([0.1, 0.3], 1, 100.0, "20.0 ± 14.1"),
        ([None], 3, 1.0, "–"),
        ([], 3, 1.0, "–"),
        ([1234.0], 0, 1.0, "1234"),
    ],
)
def test_a_cell_is_the_mean_of_what_is_known(values, digits, scale, cell):
    assert write_cell(values, digits, scale) == cell


def test_a_row_is_a_method_at_a_place_among_the_prefixes(evaluation):
    found = {"a 0": [Found(4, 1.0), Found(16, 2.0)], "a 1": [Found(4, 3.0), Found(20, 4.0)], "b": [Found(16, None)]}
    table = table_by_prefix(evaluation, "title", "note", [Column("value", field_at_prefix(found, "value"), 1)])
    assert (table.title, table.note, table.header) == ("title", "note", ["SAE", "prefix", "value"])
    assert table.rows == [
        ["a (2 seeds)", "4", "2.0 ± 1.4"],
        ["a (2 seeds)", "16–20", "3.0 ± 1.4"],
        ["b", "16", "–"],
    ]


def test_several_values_of_one_sae_are_those_of_splits(evaluation):
    found = {"a 0": [Found(4, 1.0), Found(4, 2.0)], "a 1": [Found(4, 3.0)], "b": []}
    table = table_by_prefix(evaluation, "", "", [Column("value", field_at_prefix(found, "value"), 2)])
    assert [row[2] for row in table.rows] == ["2.00 ± 1.00", "–", "–"]


def test_methods_are_named_with_their_seeds_where_there_are_several(evaluation):
    assert labelled_methods(evaluation) == {"a (2 seeds)": ["a 0", "a 1"], "b": ["b"]}
    assert labelled_methods(evaluation, ["b", "a 1"]) == {"b": ["b"], "a": ["a 1"]}
    assert evaluation.names_by_method() == {"a": ["a 0", "a 1"], "b": ["b"]}

"""Tables in the terminal: numbers stay whole, words may fold, and nothing is markup."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hf_msae.cli.terminal import print_table

NUMBERS = st.lists(st.floats(-1e6, 1e6).map("{:,.3f}".format), min_size=3, max_size=3)


def shown(*args: object, width: int = 40) -> str:
    file = io.StringIO()
    print_table(Console(file=file, width=width, highlight=False), *args)  # type: ignore[arg-type]
    return file.getvalue()


@given(rows=st.lists(NUMBERS, min_size=1, max_size=5), width=st.integers(10, 120))
def test_numbers_and_names_are_whole_however_narrow_the_terminal_is(rows, width):
    text = shown("", ["method", "an error", "a share"], [["ours", *row[1:]] for row in rows], width=width)
    rows = [row[1:] for row in rows]
    assert text.count(" ours ") == 1
    assert re.findall(r"-?[\d,]+\.\d{3}", text) == [cell for row in rows for cell in row]


def test_words_fold_beside_numbers_and_stand_at_the_left():
    words = "sailing, boats, harbour, the sea and all that is on it"
    text = shown("", ["name", "rate"], [[words, "1.5%"], ["sea", "10.5%"]], width=30)
    assert max(map(len, text.splitlines())) <= 30
    assert " ".join(re.findall(r"[a-z]+,?", text.split("rate")[1])) == f"{words} sea"
    assert re.search(r"│ sea +│ 10\.5% │", text)
    assert "│  1.5% │" in text


def test_a_name_is_said_once_where_it_opens_several_rows_and_a_number_every_time():
    by_name = shown("", ["method", "FVE"], [["BatchTopK", ".9"], ["BatchTopK", ".8"], ["ours", ".7"]])
    assert by_name.count("BatchTopK") == 1
    assert all(value in by_name for value in (".9", ".8", ".7"))
    assert shown("", ["level", "FVE"], [["64", ".9"], ["64", ".8"]]).count("64") == 2


@pytest.mark.parametrize("word", ["[bold]", "[/]", "[link=x]y"])
def test_words_of_a_text_are_no_markup(word):
    text = shown(f"of {word}", [f"a {word}", "n"], [[word, "1"]], f"note {word}", width=80)
    assert text.count(word) == 4


def test_without_rows_there_are_heading_and_note_alone():
    assert shown("Probing", ["a", "b"], [], "No probe was given.").split("\n") == [
        "",
        "Probing",
        "No probe was given.",
        "",
    ]

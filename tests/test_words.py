"""What people read: docstrings, comments, messages and pages without the slips that edits leave behind."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for top in ("hf_msae", "modeling", "spaces", "benchmarks", "scripts", "docs")
    for path in (ROOT / top).rglob("*.py")
)
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "spaces").rglob("*.md"),
    ]
)
# A word twice: a slip, but for "that that" and "had had", which English has.
DOUBLED = re.compile(r"\b(?!that\b|had\b)([a-z]{2,})[ \n]+\1\b")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@lru_cache(maxsize=1)
def all_tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """What Python reads, without comments and the ends of lines inside brackets."""
    return (token for token in all_tokens(source) if token.type not in (tokenize.NL, tokenize.COMMENT))


def content(literal: str) -> str:
    return re.sub(r"^[A-Za-z]*(\"\"\"|'''|\"|')(.*)\1$", r"\2", literal, flags=re.DOTALL)


def joined_without_space(source: str) -> list[str]:
    """Literals that Python joins, where a word runs into the next one."""
    found = []
    for one, other in pairwise(tokens(source)):
        if one.type == other.type == tokenize.STRING:
            left, right = content(one.string), content(other.string)
            if re.search(r"[a-z.,;:)]$", left) and re.match(r"[A-Za-z(]", right) and not left.endswith("\\n"):
                found.append(f"line {one.end[0]}: {left[-20:]}{right[:20]}")
    return found


def fields_without_f(source: str) -> list[str]:
    """Literals marked as f-strings, in a text of several, that have no field."""
    return [
        f"line {token.start[0]}: {token.string[:40]}"
        for token in tokens(source)
        if token.type == tokenize.STRING and re.match(r"[fF]", token.string) and "{" not in token.string
    ]


def slips_of_docstrings(source: str) -> list[str]:
    """Docstrings with an open backtick or parenthesis, a word twice, or no end."""
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)):
        text = re.sub(r"```.*?```", "", ast.get_docstring(node) or "", flags=re.DOTALL).strip()
        words = re.sub(r"`[^`]*`", "", text)
        words = re.sub(r"[\[(][^\s\])]+, [^\s\])]+[\])]", "", words)  # intervals: (0, 1]
        slips = {
            "backtick": text.count("`") % 2 == 1,
            "parenthesis": words.count("(") != words.count(")"),
            "word twice": DOUBLED.search(text) is not None,
            "no end": bool(text) and text[-1] not in ".:?!)`]>",
        }
        name = "the module" if isinstance(node, ast.Module) else node.name
        found += [f"{name}: {slip}" for slip, is_there in slips.items() if is_there]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_sources_have_no_slips(path):
    source = path.read_text(encoding="utf-8")
    assert joined_without_space(source) == []
    assert slips_of_docstrings(source) == []
    if sys.version_info < (3, 12):  # from then on, an f-string is several tokens
        assert fields_without_f(source) == []
    comments = [token for token in all_tokens(source) if token.type == tokenize.COMMENT]
    assert [token.string for token in comments if DOUBLED.search(token.string)] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_pages_have_no_slips(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [line for line in text.splitlines() if line.count("`") % 2] == []
    plain = re.sub(r"`[^`]*`", "", text)
    assert [found[0] for found in map(DOUBLED.search, plain.splitlines()) if found] == []


def test_slips_are_found():
    assert joined_without_space('x = ("one"\n  "two")') == ["line 1: onetwo"]
    assert joined_without_space('x = ("one "\n  "two")') == []
    assert slips_of_docstrings('def f():\n    """Of `x (and and y"""') == [
        "f: backtick",
        "f: parenthesis",
        "f: word twice",
        "f: no end",
    ]
    assert slips_of_docstrings('def f():\n    """Of `x`, in (0, 1]."""') == []

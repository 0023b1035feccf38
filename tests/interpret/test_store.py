"""Pages on disk and on the Hub: what is read is what was written, and what was written is what was found."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from datasets import concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from local_hub.server import LocalHub
from patience import calls_of
from pyarrow import parquet
from transformers import BertConfig, BertModel

from hf_msae.cli.tree import draw, summary
from hf_msae.interpret import Interpretation, interpret, stream_pages
from hf_msae.interpret.effects import LogitEffects, decode_tokens, nearest_latents
from hf_msae.interpret.pages import Context, Label
from hf_msae.interpret.store import InterpretationError

pytestmark = pytest.mark.slow


def make(known, folder: Path, **options) -> Interpretation:
    settings = {"max_tokens": 10**6, "packing": False, "top_contexts": 3, "sampled_contexts": 8, **options}
    return interpret(known.model, known.tokenizer, known.sae, known.texts, folder, **settings)


@pytest.fixture(scope="module")
def folder(known, tmp_path_factory) -> Path:
    return make(known, tmp_path_factory.mktemp("pages") / "interpretation").folder


def test_a_page_tells_what_is_known_of_a_latent(known, folder):
    interpretation = Interpretation.load(folder)
    page = interpretation.page(7)  # the word w1
    assert (page.latent, page.level, len(interpretation)) == (7, 2, 18)
    occurrences = " ".join(known.texts).split().count("w1")
    assert page.firing_rate == pytest.approx(occurrences / (150 * 12))
    with pytest.warns(DeprecationWarning, match=r"now page\.firing_rate"):
        assert page.density == page.firing_rate
    assert page.mean_activation == pytest.approx(0.6, abs=1e-6)
    assert sum(page.histogram) == occurrences
    assert (page.histogram_range, page.histogram.index(occurrences)) == (1.0, 38)  # 0.6 of 64 bins
    assert page.peak_tokens == ["w1"]
    assert page.name == "w1"
    assert [context.peak_token for context in [*page.top, *page.sampled]] == ["w1"] * 11
    assert [edge.parent for edge in page.parents] == [0, 4]
    assert interpretation.page(4).children[0].child in (6, 7, 8)
    dead = interpretation.page(2)
    assert (dead.is_dead, dead.name, list(dead.top), dead.histogram_range) == (True, "(never fires)", [], 0.0)


def test_contexts_are_stretches_of_the_documents(known, folder):
    for page in Interpretation.load(folder):
        for context in [*page.top, *page.sampled]:
            words = [token for token in context.tokens if token not in ("<s>", "</s>")]
            assert any(" ".join(words) in text for text in known.texts)
            assert context.peak > 0
            assert len(context.activations) == len(context.tokens)
        values = [context.peak for context in page.sampled]
        assert values == sorted(values, reverse=True)
        assert [context.quantile for context in page.sampled] == pytest.approx(
            [1 - (rank + 0.5) / len(values) for rank in range(len(values))]
        )
        assert all(context.quantile is None for context in page.top)


def test_quantiles_choose_among_the_sampled_contexts(folder):
    page = Interpretation.load(folder).page(0)
    assert [len(page.quantile(low, low + 0.25)) for low in (0, 0.25, 0.5, 0.75)] == [2, 2, 2, 2]


def test_effects_and_neighbours_are_those_of_the_weights(known, folder):
    page = Interpretation.load(folder).page(0)
    found, cosines = nearest_latents(known.sae.W_dec.detach(), 8)
    assert [other.latent for other in page.nearest] == found[0].tolist()
    assert [other.cosine for other in page.nearest] == pytest.approx(cosines[0].tolist())
    ids = [effect.id for effect in page.promoted]
    assert [effect.token for effect in page.promoted] == decode_tokens(known.tokenizer, ids)
    values = [effect.effect for effect in page.promoted]
    assert len(values) == 12
    assert values == sorted(values, reverse=True)
    assert page.suppressed[0].effect < 0 < page.promoted[0].effect


def test_a_prefix_of_the_dictionary_and_several_files_read_as_one(known, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_msae.interpret.writing.LATENTS_PER_FILE", 5)
    parts = make(known, tmp_path / "parts")
    assert sorted(path.name for path in parts.folder.glob("*.parquet")) == [
        f"latents-{i:05d}-of-00004.parquet" for i in range(4)
    ]
    whole = Interpretation.load(folder)
    assert list(parts) == list(whole)
    (parts.folder / "latents-00002-of-00004.parquet").unlink()
    with pytest.raises(InterpretationError, match="13 rows of 18 latents; some files are missing"):
        Interpretation.load(parts.folder).page(0)


def test_a_page_costs_the_same_however_many_there_are(folder):
    few, many = Interpretation.load(folder), Interpretation.load(folder)
    many.source = replace(many.source, num_latents=40 * 18)
    many.dataset = concatenate_datasets([few.dataset] * 40).flatten_indices()
    for interpretation in (few, many):
        interpretation.page(0)  # what is read once is read
    assert calls_of(lambda: many.page(7)) < 1.5 * calls_of(lambda: few.page(7))


def test_labels_are_kept_beside_the_pages_and_name_them(known, tmp_path):
    interpretation = make(known, tmp_path / "interpretation")
    assert interpretation.names[4] == ", ".join(interpretation.page(4).peak_tokens)
    interpretation.save_labels({4: Label("birds", 0.9, None)})
    interpretation.save_labels({5: Label("fish")})
    assert interpretation.names[4] == "birds"
    again = Interpretation.load(tmp_path)  # the SAE's folder, in which it lies
    assert again.labels == {4: Label("birds", 0.9, None), 5: Label("fish")}
    assert again.page(4).label == Label("birds", 0.9, None)
    (tmp_path / "interpretation" / "labels.json").write_text('{"4": ["birds"]}')
    with pytest.raises(InterpretationError, match="each labelled latent"):
        Interpretation.load(tmp_path)


def test_it_goes_to_the_hub_beside_the_sae_and_comes_back(known, folder, hub: LocalHub):
    repo = f"{hub.user}/birds"
    known.sae.push_to_hub(repo)
    local = Interpretation.load(folder)
    assert repo in local.push(repo)
    fetched = Interpretation.load(repo)
    assert fetched.folder.name == "interpretation"
    assert list(fetched) == list(local)
    assert fetched.hierarchy == local.hierarchy


def test_mistakes_are_named(known, folder, tmp_path, hub: LocalHub):
    interpretation = Interpretation.load(folder)
    with pytest.raises(InterpretationError, match="no latent 18; they are 0 to 17"):
        interpretation.page(18)
    with pytest.raises(InterpretationError, match="holds no interpretation; make one with `hf-msae interpret"):
        Interpretation.load(tmp_path)
    with pytest.raises(InterpretationError, match="neither a folder nor a repo"):
        Interpretation.load("nobody/nothing")
    with pytest.raises(InterpretationError, match="Push the SAE first"):
        interpretation.push(f"{hub.user}/absent")
    known.sae.push_to_hub(f"{hub.user}/bare")
    with pytest.raises(InterpretationError, match="holds no interpretation in interpretation"):
        Interpretation.load(f"{hub.user}/bare")
    (tmp_path / "interpretation.json").write_text(json.dumps({"num_latents": 3}))
    with pytest.raises(InterpretationError, match="Make it again"):
        Interpretation.load(tmp_path)


def test_nothing_is_read_or_overwritten_where_something_lies(known, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(known, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(known, tmp_path, monkeypatch):
    def fail(self: LogitEffects, count: int) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(LogitEffects, "extremes", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        make(known, tmp_path / "interpretation")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_has_pages_without_promoted_tokens(tokenizer, tmp_path):
    from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig

    torch.manual_seed(0)
    config = BertConfig(vocab_size=80, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=8, num_latents=12, prefix_sizes=[12], k=2, site="layers.0"))
    sae.eval().threshold.fill_(0.5)
    pages = interpret(
        BertModel(config).eval(), tokenizer, sae, ["w1 w2 w3 w4"] * 9, tmp_path / "x", max_tokens=30, context_length=8
    )
    assert list(pages.page(0).promoted) == []
    assert pages.hierarchy is None
    assert any(page.firing_rate > 0 for page in pages)


@given(st.lists(st.tuples(st.sampled_from([" a", "b", " c", "\n", "…"]), st.booleans()), min_size=1, max_size=12))
def test_marks_add_nothing_but_themselves(tokens):
    texts, marks = [text for text, _ in tokens], [mark for _, mark in tokens]
    context = Context(texts, [float(mark) for mark in marks], 0)
    marked = context.marked(marks)
    assert marked.replace("<<", "").replace(">>", "") == context.text
    runs = sum(mark and not (index and marks[index - 1]) for index, mark in enumerate(marks))
    assert marked.count("<<") == marked.count(">>") == runs


def test_marks_stand_at_words_and_not_at_spaces():
    context = Context(["The", " small", " owl", " flew"], [0.0, 0.2, 1.0, 0.9], 2)
    assert context.marked_active() == "The small <<owl flew>>"
    assert context.marked_active(share=0.1) == "The <<small owl flew>>"
    assert context.active(share=0.0) == [False, True, True, True]
    assert context.active() == [False, False, True, True]


def test_pages_are_streamed_from_files(folder, hub: LocalHub, known):
    repo = f"{hub.user}/streamed"
    known.sae.push_to_hub(repo)
    local = Interpretation.load(folder)
    local.push(repo)
    stream = stream_pages(repo)
    first = next(stream)
    assert (first.latent, first.firing_rate, first.top) == (0, local.page(0).firing_rate, local.page(0).top)
    assert [page.latent for page in stream] == list(range(1, 18))


# Damaged and absurd files

NONSENSE = [None, -1, math.nan, 10**400, 2**62, "../x", [], [[3]], {"a": 1}]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where something lies in JSON: of a list only the first element."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:20]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def damaged(value: object) -> Iterator[str]:
    """The JSON with each part of it gone, then replaced by each kind of nonsense; and what is no JSON at all."""
    text = json.dumps(value)
    yield from ("", "{", text[: len(text) // 2], "[" * 100_000, "1" * 10_000, "null")
    for path in places(value):
        for index, other in enumerate(["gone", *NONSENSE]):
            copied = json.loads(text)
            if not path:
                yield json.dumps(other)
                continue
            inside = copied
            for key in path[:-1]:
                inside = inside[key]
            if index == 0:
                del inside[path[-1]]
            else:
                inside[path[-1]] = other
            yield json.dumps(copied)


@pytest.fixture
def damageable(folder, tmp_path) -> Path:
    """A copy of the pages, with labels."""
    copied = tmp_path / "interpretation"
    shutil.copytree(folder, copied)
    Interpretation.load(copied).save_labels({4: Label("birds", 0.9, None), 5: Label("fish")})
    return copied


def use(folder: Path) -> None:
    """What is read of an interpretation, and everything that is written of its tree."""
    found = Interpretation.load(folder)
    for latent in range(len(found)):
        assert found.page(latent).name == found.names[latent]
    tree = found.hierarchy
    if tree is not None:
        assert summary(tree)
        assert len(draw(tree, found.names, None, 3, 5)) <= 6
        assert tree.to_graphviz(dict(enumerate(found.names))).endswith("}\n")


@pytest.mark.parametrize("name", ["interpretation.json", "hierarchy.json", "labels.json"])
def test_damaged_files_are_used_as_they_are_or_refused_in_a_sentence(damageable, name):
    path = damageable / name
    whole = path.read_text()
    use(damageable)
    said = []
    for text in damaged(json.loads(whole)):
        path.write_text(text)
        try:
            use(damageable)
        except InterpretationError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all(len(words) < 700 and str(damageable) in words for words in said)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InterpretationError):
        use(damageable)


def rewrite(folder: Path, change: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    (path,) = folder.glob("latents-*.parquet")
    parquet.write_table(change(parquet.read_table(path)), path)


def set_column(name: str, values: Any) -> Callable[[pyarrow.Table], pyarrow.Table]:
    def change(table: pyarrow.Table) -> pyarrow.Table:
        column = values(table.column(name)) if callable(values) else values
        return table.set_column(table.column_names.index(name), name, column)

    return change


def shorter(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """Contexts with an activation less than they have tokens."""
    rows = [[one | {"activations": one["activations"][1:]} for one in row] for row in column.to_pylist()]
    return pyarrow.array(rows, column.type)


TABLES = {
    "a column is missing": lambda table: table.drop_columns(["density"]),
    "a column too many": lambda table: table.append_column("more", pyarrow.array([0] * 18)),
    "numbers are texts": set_column("density", pyarrow.array(["x"] * 18)),
    "numbers are missing": set_column("density", pyarrow.array([None] * 18, pyarrow.float64())),
    "lists are missing": set_column("top", lambda column: pyarrow.array([None] * 18, column.type)),
    "tokens are missing": set_column("peak_tokens", pyarrow.array([[None]] * 18, pyarrow.list_(pyarrow.string()))),
    "tokens are numbers in a dictionary": set_column("peak_tokens", pyarrow.array([{"a": 1}] * 18)),
    "contexts of two lengths": set_column("top", shorter),
    "latents of another order": set_column("latent", pyarrow.array(list(range(18))[::-1], pyarrow.int32())),
    "no rows": lambda table: table.slice(0, 0),
    "rows are missing": lambda table: table.slice(0, 5),
}


@pytest.mark.parametrize("kind", TABLES)
def test_pages_of_another_form_are_refused_in_a_sentence(damageable, kind):
    rewrite(damageable, TABLES[kind])
    with pytest.raises(InterpretationError, match=re.escape(str(damageable))):
        use(damageable)


@pytest.mark.parametrize("kind", ["empty", "half", "noise", "directory", "absent"])
def test_files_that_are_no_parquet_are_refused_in_a_sentence(damageable, kind):
    (path,) = damageable.glob("latents-*.parquet")
    content = path.read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "noise": content[::-1]}[kind])
    with pytest.raises(InterpretationError, match=re.escape(str(damageable))):
        use(damageable)


@pytest.mark.parametrize("name", ["..", "../interpretation", "/etc", "a/../.."])
def test_no_interpretation_is_read_beside_the_folder_that_was_named(damageable, hub: LocalHub, name):
    (damageable / "below").mkdir()
    hub.requests.clear()
    for source in (damageable / "below", "tester/birds"):
        with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
            Interpretation.load(source, subfolder=name)
    with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
        Interpretation.load(damageable).push("tester/birds", subfolder=name)
    with pytest.raises(ValueError, match=r"The subfolder .* must be a path below"):
        next(stream_pages("tester/birds", subfolder=name))
    assert hub.requests == []

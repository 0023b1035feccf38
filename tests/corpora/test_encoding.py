"""Data sets of latents hold what the SAE says of each token, once, whatever happened on the way."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi

from hf_msae import EncodedLatents, MatryoshkaSAE, MatryoshkaSAEConfig, encode_dataset
from hf_msae.corpora import EncodedError
from hf_msae.data import DatasetError
from hf_msae.hub import PublishError
from hf_msae.sites import SiteError, capture, resolve_site

LENGTH = 12


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    """Random, of the tiny LM's first layer, with about a quarter of its latents active on a token."""
    torch.manual_seed(1)
    config = MatryoshkaSAEConfig(
        hidden_size=16, num_latents=24, prefix_sizes=[6, 12, 24], k=4, site="layers.0", context_length=LENGTH
    )
    sae = MatryoshkaSAE(config).eval()
    torch.nn.init.normal_(sae.W_enc)
    sae.config.norm_limit = 0.0
    sae.threshold.fill_(0.1)
    return sae


@pytest.fixture(scope="module")
def rows(lm, tokenizer, sae, texts, tmp_path_factory) -> list[dict]:
    """A row a token, as `datasets` reads them."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    encode_dataset(lm, tokenizer, sae, texts, folder, shard_tokens=1500)
    return read(folder)


def read(folder: Path) -> list[dict]:
    return load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache")).to_list()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_hand(lm, tokenizer, sae, text: str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Position, token and latents of a document, a window at a time: BOS and eleven tokens."""
    ids = tokenizer(text).input_ids
    site = resolve_site(lm, "layers.0")
    for begin in range(0, len(ids), LENGTH - 1):
        part = ids[begin : begin + LENGTH - 1]
        x = capture(lm, [site], input_ids=torch.tensor([[tokenizer.bos_token_id, *part]]))[site][0, 1:]
        yield from zip(itertools.count(begin), part, sae.encode(x), strict=False)


def test_rows_are_what_the_sae_says_of_each_token(lm, tokenizer, sae, texts, rows):
    assert [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    grouped = {number: list(part) for number, part in itertools.groupby(rows, lambda row: row["document"])}
    assert list(grouped) == list(range(len(texts)))
    active = 0
    for number in (0, 1, 57, 130, 299):
        expected = list(by_hand(lm, tokenizer, sae, texts[number]))
        assert len(grouped[number]) == len(expected)
        for row, (position, token, latents) in zip(grouped[number], expected, strict=True):
            # This tokenizer adds no BOS of its own; the one in front of a document is its first token.
            assert (row["position"], row["token_id"]) == (position + 1, token)
            assert row["latents"] == latents.nonzero().flatten().tolist()
            torch.testing.assert_close(torch.tensor(row["values"]), latents[latents > 0])
            active += len(row["latents"])
    assert active > 100


def test_a_prefix_and_levels_are_cut_from_the_same_rows(lm, tokenizer, sae, texts, rows, tmp_path):
    encode_dataset(lm, tokenizer, sae.truncate(12), texts, tmp_path / "prefix", shard_tokens=1500)
    encode_dataset(lm, tokenizer, sae, texts, tmp_path / "levels", by_level=True, shard_tokens=1500)
    prefix, levels = read(tmp_path / "prefix"), read(tmp_path / "levels")
    assert len(levels) == 3 * len(rows)
    places = ("document", "position", "token_id")
    for row, cut, *parts in zip(rows, prefix, *(levels[level::3] for level in range(3)), strict=True):
        inner = [latent for latent in row["latents"] if latent < 12]
        assert cut["latents"] == inner
        assert cut["values"] == pytest.approx(row["values"][: len(inner)], rel=1e-5)
        assert [part["level"] for part in parts] == [0, 1, 2]
        assert [latent for part in parts for latent in part["latents"]] == row["latents"]
        assert [value for part in parts for value in part["values"]] == row["values"]
        assert all(6 <= latent < 12 for latent in parts[1]["latents"])
        assert [part[name] for part in (cut, *parts) for name in places] == [row[name] for name in places] * 4


def test_pooled_rows_are_made_of_the_documents_tokens(lm, tokenizer, sae, texts, rows, tmp_path):
    grouped = [list(part) for _, part in itertools.groupby(rows, lambda row: row["document"])]
    dense = torch.zeros(len(rows), 24, dtype=torch.float64)
    for index, row in enumerate(rows):
        dense[index, row["latents"]] = torch.tensor(row["values"], dtype=torch.float64)
    documents = dense.split([len(part) for part in grouped])
    pools = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0)}
    for pool, pooled in pools.items():
        folder = tmp_path / pool
        encode_dataset(lm, tokenizer, sae, texts, folder, pool=pool, dtype="float16" if pool == "max" else "float32")
        found = read(folder)
        assert [row["text"] for row in found] == texts
        assert [row["num_tokens"] for row in found] == [len(part) for part in grouped]
        for row, x in zip(found, documents, strict=True):
            expected = pooled(x)
            assert row["latents"] == expected.nonzero().flatten().tolist()
            near = 1e-3 if pool == "max" else 1e-5
            assert row["values"] == pytest.approx(expected[expected > 0].tolist(), rel=near)


def test_a_run_that_is_killed_anywhere_writes_the_same(lm, tokenizer, sae, texts, tmp_path, monkeypatch):
    """Before and after every file takes its place: nothing else on the disk is believed when a run goes on."""
    options = {"shard_tokens": 400, "max_tokens": 1200}
    whole = files(encode_dataset(lm, tokenizer, sae, texts, tmp_path / "latents", **options).folder)
    (tmp_path / "latents").rename(tmp_path / "whole")
    assert sum(name.endswith(".parquet") for name in whole) >= 3
    replace, rename = os.replace, Path.rename
    for stops_after in (False, True):
        calls = itertools.count()
        kill_at = [0]

        def once(make, *arguments, stops_after=stops_after, calls=calls, kill_at=kill_at):
            dies = next(calls) == kill_at[0]
            if dies and not stops_after:
                raise KeyboardInterrupt
            make(*arguments)
            if dies:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", lambda *arguments, once=once: once(replace, *arguments))
        monkeypatch.setattr(Path, "rename", lambda *arguments, once=once: once(rename, *arguments))
        runs = 0
        while not (tmp_path / "latents").exists():
            runs += 1
            kill_at[0] = next(calls) + runs  # each run comes one step further than the one before
            try:
                encode_dataset(lm, tokenizer, sae, texts, tmp_path / "latents", **options)
            except KeyboardInterrupt:
                (tmp_path / "latents.incomplete" / ".latents-00009.parquet.abc.part").write_bytes(b"half")
        assert runs > 3
        found = files(tmp_path / "latents")
        found.pop("progress.json", None)  # of a run that died between the last two steps
        found.pop(".latents-00009.parquet.abc.part", None)
        assert found == whole
        monkeypatch.undo()
        rename(tmp_path / "latents", tmp_path / f"done {stops_after}")


def test_packed_windows_tell_which_document_each_token_is_of(known, tmp_path):
    """The SAE reads the embeddings, where a token is the same whatever stands before it."""
    for packing in (False, True):
        encode_dataset(known.model, known.tokenizer, known.sae, known.texts, tmp_path / str(packing), packing=packing)
    apart, packed = read(tmp_path / "False"), read(tmp_path / "True")
    assert len(apart) == sum(len(text.split()) for text in known.texts)
    assert packed == apart


def test_outliers_have_no_row_and_are_counted(lm, tokenizer, sae, texts, rows, tmp_path):
    site = resolve_site(lm, "layers.0")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(texts[0]).input_ids[: LENGTH - 1]]])
    norms = capture(lm, [site], input_ids=ids)[site][0, 1:].norm(dim=-1)
    limited = sae.truncate(24)
    limited.config.norm_limit = float(norms.median())
    found = encode_dataset(lm, tokenizer, limited, texts[:1], tmp_path / "latents")
    kept = [row for row in read(found.folder) if row["position"] < LENGTH]
    assert [row["position"] for row in kept] == [
        1 + place for place in range(len(norms)) if norms[place] <= norms.median()
    ]
    assert found.index["num_outliers"] + len(read(found.folder)) == found.index["num_tokens"]


def test_the_norm_limit_of_an_sae_without_one_is_kept_over_a_kill(lm, tokenizer, sae, texts, tmp_path):
    unlimited = sae.truncate(24)
    unlimited.config.norm_limit = None
    found = encode_dataset(lm, tokenizer, unlimited, texts, tmp_path / "latents", norm_outlier_multiple=1.2)
    assert found.index["norm_limit"] > 0
    assert 0 < found.index["num_outliers"] < found.index["num_tokens"]


def test_it_is_published_and_loads_from_the_hub(lm, tokenizer, sae, texts, rows, tmp_path, hub):
    found = encode_dataset(lm, tokenizer, sae, texts, tmp_path / "latents", shard_tokens=1500)
    repo = f"{hub.user}/latents"
    assert "/commit/" in found.push(repo, private=True)
    api = HfApi()
    assert api.dataset_info(repo).private
    assert load_dataset(repo, split="train").to_list() == rows
    opened = EncodedLatents.load(repo)
    assert opened.index == found.index
    card = Path(api.hf_hub_download(repo, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
    assert f'load_dataset("{repo}"' in card
    assert str(tmp_path) not in card
    edited = card + "\nWritten by a person.\n"
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset")
    encode_dataset(lm, tokenizer, sae, texts[:20], tmp_path / "smaller").push(repo)
    names = api.list_repo_files(repo, repo_type="dataset")
    assert [name for name in names if name.endswith(".parquet")] == ["latents-00000.parquet"]
    card = Path(api.hf_hub_download(repo, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
    assert card.endswith("Written by a person.\n")
    assert "of 20 documents" in card
    api.create_repo(f"{hub.user}/public", repo_type="dataset")
    with pytest.raises(PublishError, match="exists and is public"):
        found.push(f"{hub.user}/public", private=True)
    with pytest.raises(EncodedError, match="neither a folder nor a data set"):
        EncodedLatents.load(f"{hub.user}/absent")


def test_what_cannot_be_is_refused_before_any_work(lm, known, tokenizer, sae, texts, tmp_path):
    def encode(folder: str = "latents", of: MatryoshkaSAE = sae, documents=texts, **options):
        return encode_dataset(lm, tokenizer, of, documents, tmp_path / folder, **options)

    for said, options in (
        ("pool is max, mean, sum or None, got 'median'", {"pool": "median"}),
        ("dtype is float32 or float16, got 'int8'", {"dtype": "int8"}),
        ("at least 1, got 0", {"max_tokens": 0}),
        ("lm_batch_size must be at least 1, got 0", {"lm_batch_size": 0}),
    ):
        with pytest.raises(ValueError, match=said):
            encode(**options)
    with pytest.raises(SiteError):
        encode(of=known.sae)
    with pytest.raises(DatasetError, match="No document"):
        encode("nothing", documents=["</s>", "<s>"])
    assert not list(tmp_path.glob("latents*"))
    encode(documents=texts[:5])
    with pytest.raises(EncodedError, match="already exists"):
        encode(documents=texts[:5])


def test_an_unfinished_folder_of_other_settings_is_refused(lm, tokenizer, sae, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(lm, tokenizer, sae, texts[:9], tmp_path / "latents")
    with pytest.raises(EncodedError, match="unfinished latents with another pool"):
        encode_dataset(lm, tokenizer, sae, texts[:9], tmp_path / "latents", pool="max")
    with pytest.raises(EncodedError, match="with another data"):
        encode_dataset(lm, tokenizer, sae, ["w1 w2", *texts[1:9]], tmp_path / "latents")
    with pytest.raises(EncodedError, match="are incomplete"):
        EncodedLatents.load(tmp_path / "latents")


def test_damaged_folders_are_told(lm, tokenizer, sae, texts, tmp_path):
    folder = encode_dataset(lm, tokenizer, sae, texts[:9], tmp_path / "latents").folder
    index = (folder / "index.json").read_text()
    for old, new, said in (
        ('"version": 1', '"version": 9', "have version 9"),
        ("latents-00000", "../../etc/passwd", "its 'shards' is"),
        ('"num_tokens": ', '"num_tokens": -', "its 'num_tokens' is -"),
        ("latents-00000", "latents-00007", "is missing"),
    ):
        (folder / "index.json").write_text(index.replace(old, new))
        with pytest.raises(EncodedError, match=said):
            EncodedLatents(folder)

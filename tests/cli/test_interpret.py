"""`hf-msae interpret` and `hf-msae tree` as a user types them."""

import copy
import json
from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.interpret import Hierarchy, Interpretation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, tokenizer) -> Path:
    """A model whose words w0 … w5 are of one kind, an SAE that says so at level 0 and names each at level 1, text."""
    folder = tmp_path_factory.mktemp("interpret")
    model = copy.deepcopy(lm)
    ids = tokenizer.convert_tokens_to_ids([f"w{i}" for i in range(6)])
    weights = model.get_input_embeddings().weight.data.zero_()
    weights[ids, 0] = 1.0
    weights[ids, range(2, 8)] = 0.6
    model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    config = MatryoshkaSAEConfig(
        hidden_size=16,
        num_latents=8,
        prefix_sizes=[2, 8],
        k=2,
        site="model.embed_tokens:output",
        context_length=16,
        base_model=str(folder / "lm"),
    )
    sae = MatryoshkaSAE(config).eval()
    for rows in (sae.W_enc, sae.W_dec):
        rows.data.copy_(torch.eye(8, 16))
    sae.threshold.fill_(0.1)
    sae.save_pretrained(folder / "sae")
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{i}" for i in torch.randint(12, (14,), generator=generator).tolist()) for _ in range(120)]
    (folder / "texts.txt").write_text("\n\n".join(lines))
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_pages_are_written_and_the_tree_is_read_from_them(folder, tmp_path, capsys):
    data = ("--dataset", folder / "texts.txt")
    MatryoshkaSAE.from_pretrained(folder / "sae").save_pretrained(tmp_path / "sae")
    assert run("interpret", tmp_path / "sae", *data, "--max-tokens", "5k", "--no-packing") == 0
    text = capsys.readouterr().out
    assert "1,680 tokens" in text
    assert f"Next: hf-msae tree {tmp_path / 'sae'}" in "".join(text.splitlines())
    pages = Interpretation.load(tmp_path / "sae")
    assert pages.source.num_tokens == 1680
    assert [pages.page(latent).peak_tokens[0] for latent in range(2, 8)] == [f"w{i}" for i in range(6)]
    # Without --dataset and although the base model has none: nothing is read but the pages.
    assert run("tree", tmp_path / "sae", "--min-score", "0.2") == 0
    assert "1,680 tokens; pairs left by each filter" in " ".join(capsys.readouterr().out.split())


def test_the_tree_is_measured_printed_and_exported(folder, tmp_path, capsys):
    data = ("--dataset", folder / "texts.txt")
    output = tmp_path / "tree.json"
    assert run("tree", folder / "sae", *data, "--max-tokens", "2k", "--output", output) == 0
    hierarchy = Hierarchy.from_json(output.read_text())
    assert {(edge.parent, edge.child) for edge in hierarchy.edges} == {(0, latent) for latent in range(2, 8)}
    text = capsys.readouterr().out
    for edge in hierarchy.edges:
        assert f"{edge.child} w{edge.child - 2}  {hierarchy.share(edge):.0%}" in text
    density = hierarchy.counts[0] / hierarchy.num_tokens
    assert f"  fires on {density:.1%} of tokens" in text
    assert run("tree", folder / "sae", *data, "--root", 0, "--max-children", 2, "--output", tmp_path / "t.dot") == 0
    text = capsys.readouterr().out
    assert "… and 4 more" in text
    assert "0 -> 2" in (tmp_path / "t.dot").read_text()


def test_mistakes_are_one_clear_line_and_nothing_is_written(folder, tmp_path, capsys):
    sae, data = folder / "sae", ("--dataset", folder / "texts.txt")
    flat = MatryoshkaSAE.from_pretrained(sae, prefix=2)
    flat.save_pretrained(tmp_path / "flat")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    cases = [
        (("interpret", "./nowhere"), "There is no folder ./nowhere"),
        (("interpret", "someone/their-sae"), "is a Hub repo; say where to write with --output-dir"),
        (("interpret", "./nowhere", "--output-dir", tmp_path / "out"), "There is no folder ./nowhere"),
        (("interpret", sae, *data, "--output-dir", tmp_path / "full"), "exists and is not empty"),
        (("interpret", sae, "--output-dir", tmp_path / "out"), "needs a --dataset"),
        (("interpret", sae, *data, "--output-dir", tmp_path / "out", "--max-tokens", "0"), "at least 1, got 0"),
        (
            ("interpret", sae, *data, "--output-dir", tmp_path / "out", "--labels-model", folder / "lm"),
            "Yes and No begin with the same token",
        ),
        (("tree", tmp_path.parent / "absent"), "There is no folder"),
        (("tree", sae, *data, "--depth", "0"), "must be at least 1, got 0"),
        (("tree", sae, *data, "--output", "tree.png"), "must end in .json, .dot or .gv"),
        (("tree", sae, *data, "--root", "99"), "--root 99 is no latent; they are 0 to 7"),
        (("tree", tmp_path / "flat", *data), "has one level only"),
    ]
    for arguments, words in cases:
        assert run(*arguments) == 2, words
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_story_world_needs_no_network(tmp_path, capsys):
    torch.manual_seed(0)
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(
            hidden_size=128, num_latents=32, prefix_sizes=[8, 32], k=4, site="layers.2", base_model="stories"
        )
    ).eval()
    sae.threshold.fill_(1.0)
    sae.save_pretrained(tmp_path / "sae")
    assert run("interpret", tmp_path / "sae", "--max-tokens", "3k", "--output-dir", tmp_path / "pages") == 0
    assert "stories of hf_msae.worlds.stories" in " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "pages" / "interpretation.json").read_text())
    assert (written["num_latents"], written["base_model"]) == (32, "stories")

"""`hf-msae eval` as a user types it, on the story model and on a random one."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.main import main
from hf_msae.evaluation.labelled import MIN_EXAMPLES

pytestmark = pytest.mark.slow


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def story_sae(folder: Path, seed: int = 0, prefix_sizes: tuple[int, ...] = (16, 64)) -> Path:
    """An SAE of the story model that nobody trained: enough to be measured."""
    torch.manual_seed(seed)
    config = MatryoshkaSAEConfig(
        hidden_size=128,
        num_latents=prefix_sizes[-1],
        prefix_sizes=list(prefix_sizes),
        k=8,
        site="model.layers.2:output",
        base_model="stories",
        context_length=128,
    )
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(0.5)
    sae.save_pretrained(folder)
    return folder


SMALL = (
    "--eval-tokens", "1500", "--ce-tokens", "300", "--rate-tokens", "500", "--stories", "80", "--splits", "2",
    "--use-cpu",
)  # fmt: skip


class Page(HTMLParser):
    """Text, addresses that a browser would fetch, and the number of tables and drawings."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.fetched, self.tags = "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    one, two = story_sae(folder / "one"), story_sae(folder / "two", seed=1)
    assert run("eval", str(one), "--compare", str(two), *SMALL, "--output-dir", str(folder / "out")) == 0
    return folder / "out"


def test_every_metric_of_every_sae_and_prefix_is_in_the_json(evaluated):
    result = json.loads((evaluated / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert list(result["core"]) == ["one", "two", "random", "pca"]
    assert result["methods"] == {"one": "one", "two": "one", "random": "random", "pca": "pca"}
    assert result["facts"]["tokens"] >= 1500
    assert result["facts"]["site"] == "model.layers.2:output"
    for name in ("one", "two", "random"):
        levels = result["core"][name]["measurement"]["levels"]
        assert [level["prefix"] for level in levels] == [16, 64]
        assert all(level["kl"] > 0 for level in levels)
        assert len(result["geometry"][name]) == 2
        assert {level["prefix"] for level in result["absorption"][name]["levels"]} == {16, 64}
    assert result["core"]["pca"]["measurement"]["levels"][-1]["fve"] == pytest.approx(1, abs=1e-6)
    assert [item["prefixes"] for item in result["agreement"]] == [[16, 16], [64, 64]]
    scores = result["probing"]["scores"]
    assert {score["split"] for score in scores} == {0, 1}
    whole = [score["accuracy"] for score in scores if score["features"] == "whole activation"]
    assert min(whole) > 0.95
    assert max(score["accuracy"] for score in scores) <= 1
    assert len(result["probing"]["concepts"]) == len(result["probing"]["by_concept"]["one"])
    points = [point for point in result["progressive"]["points"] if point["sae"] == "two"]
    assert [(point["order"], point["prefix"]) for point in points] == [
        (order, prefix) for order in ("own", "energy", "frequency") for prefix in (16, 64)
    ]
    core = [level["fve"] for level in result["core"]["two"]["measurement"]["levels"]]
    assert [point["fve"] for point in points[:2]] == pytest.approx(core, abs=1e-9)
    assert "importances" not in result["progressive"]
    assert (result["stitching"], result["meta"], result["hedging"]) == ([], {}, {})


def test_the_report_needs_nothing_else_and_shows_the_numbers(evaluated):
    html = (evaluated / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.fetched == []
    assert "<script" not in html
    assert "url(http" not in html
    assert page.tags.count("svg") == 7
    assert page.tags.count("table") == 10
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    result = json.loads((evaluated / "evaluation.json").read_text())
    rows = [result["core"][name]["measurement"]["levels"][-1]["fve"] for name in ("one", "two")]
    assert f"{sum(rows) / 2:.3f} ± " in page.text
    assert "one (2 seeds)" in page.text
    tokens = result["facts"]["tokens"]
    assert f"On {tokens:,} tokens" in page.text


def test_the_terminal_shows_whole_numbers_and_where_the_report_is(tmp_path, capsys):
    sae = story_sae(tmp_path / "sae")
    arguments = ("--metrics", "core", "--baselines", "none", "--output-dir", str(tmp_path / "out"))
    assert run("eval", str(sae), *SMALL, *arguments) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for level in result["core"]["sae"]["measurement"]["levels"]:
        assert f" {level['fve']:.3f} " in text
        assert f" {level['kl']:.3f} " in text
    assert "…" not in text
    assert str(tmp_path / "out" / "report.html") in text
    assert result["probing"] is None
    assert run("eval", str(sae), *SMALL, *arguments) == 2
    assert "holds another evaluation (evaluation.json, report.html)" in capsys.readouterr().err


def test_trained_baselines_and_labelled_documents_on_another_model(lm, tokenizer, texts, tmp_path, capsys):
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    # A label that a mean activation tells: whether w1 or w2 is repeated.
    rows = [{"text": f"w{i % 2 + 1} w{i % 7 + 5} w{i % 2 + 1}", "label": "ab"[i % 2]} for i in range(400)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = (
        "train", "--model", str(tmp_path / "lm"), "--dataset", str(tmp_path / "texts.txt"), "--site", "layers.0",
        "--num-latents", "32", "--k", "4", "--prefix-sizes", "8", "32", "--batch-size", "64", "--max-tokens", "1_280",
        "--block-tokens", "300", "--eval-tokens", "400", "--calibration-tokens", "200", "--ce-tokens", "0",
        "--context-length", "32", "--save-steps", "0", "--use-cpu", "--disable-tqdm",
    )  # fmt: skip
    assert run(*train, "--output-dir", str(tmp_path / "sae")) == 0
    arguments = (
        "eval", str(tmp_path / "sae"), "--dataset", str(tmp_path / "texts.txt"), "--labelled",
        str(tmp_path / "labels.jsonl"), "--eval-tokens", "400", "--ce-tokens", "100", "--rate-tokens", "200",
        "--splits", "1", "--baselines", "batch_topk", "pruned_topk", "frozen_decoder", "--baseline-seeds", "2",
        "--use-cpu", "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert run(*arguments) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    trained = ["batch_topk", "pruned_topk", "frozen_decoder"]
    assert list(result["core"]) == ["sae", *(f"{kind} seed {seed}" for seed in (0, 1) for kind in trained)]
    pruned = result["core"]["pruned_topk seed 1"]["measurement"]["levels"]
    assert [level["prefix"] for level in pruned] == [8, 32]
    assert pruned[0]["l0"] < pruned[1]["l0"]
    first, second = (result["core"][f"batch_topk seed {seed}"]["measurement"]["levels"][0] for seed in (0, 1))
    assert first["fve"] != second["fve"]
    assert result["probing"]["concepts"] == ["a", "b"]
    own = json.loads((tmp_path / "out/baselines/seed-0/batch_topk/metrics.json").read_text())
    assert own["training_tokens"] == 1280


def test_stitching_leads_from_the_smaller_to_the_larger(tmp_path, capsys):
    large, small = story_sae(tmp_path / "large"), story_sae(tmp_path / "small", seed=1, prefix_sizes=(32,))
    arguments = ("--metrics", "stitching", "--ce-tokens", "0", "--baselines", "none", "--output-dir")
    assert run("eval", str(large), "--compare", str(small), *SMALL, *arguments, str(tmp_path / "out")) == 0
    assert "Stitching" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert (result["progressive"], result["geometry"]) == (None, {})
    pairs = [(item["novelty"]["small"], item["novelty"]["large"]) for item in result["stitching"]]
    assert pairs == [("large, 16", "large, 64"), ("large, 16", "large"), ("small", "large")]
    levels, whole, between = result["stitching"]
    assert levels["curve"] is None
    assert levels["novelty"]["fire"] < whole["novelty"]["fire"] == between["novelty"]["fire"]
    fve = {name: core["measurement"]["levels"][-1]["fve"] for name, core in result["core"].items()}
    assert between["curve"]["curve"][0]["fve"] == pytest.approx(fve["small"], abs=1e-6)
    assert between["curve"]["curve"][-1]["fve"] == pytest.approx(fve["large"], abs=1e-6)
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert "From small to large" in page.text
    assert page.tags.count("svg") == 3 + 2


def test_composition_and_hedging_come_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_msae.research.meta.REPORT_STEPS", 50)
    monkeypatch.setattr("hf_msae.research.hedging.REPORT_STEPS", 20)
    sae = story_sae(tmp_path / "sae")
    arguments = ("--metrics", "meta", "hedging", "--ce-tokens", "0", "--baselines", "random", "--output-dir")
    assert run("eval", str(sae), *SMALL, *arguments, str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "Meta-SAEs" in shown
    assert "Hedging" in shown
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    # What nobody trained is not asked what training made of it.
    assert list(result["meta"]) == list(result["hedging"]) == ["sae"]
    meta = result["meta"]["sae"]
    assert (meta["rows"], meta["num_latents"]) == (64, 16)
    # These rows are random too: as composed as any.
    assert meta["explained"] == pytest.approx(meta["explained_random"], abs=0.1)
    assert [item["prefix"] for item in result["hedging"]["sae"]] == [16, 64]
    assert all(0 <= item["degree"] <= 1 for item in result["hedging"]["sae"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--metrics", "cores"],
            "no metric 'cores'; there are core, geometry, probing, absorption, erasure, progressive, stitching, "
            "meta, hedging.",
        ),
        (["--baselines", "pcb"], "no baseline 'pcb'"),
        (["--baselines", "batch_topk"], "give --baseline-tokens"),
        (["--labelled", "nowhere.jsonl"], "nowhere.jsonl is no such file"),
        (["--site", "layers.0.attention"], "no site 'layers.0.attention'"),
        (["--splits", "0"], "splits must be at least 1, got 0"),
        (["--rate-tokens", "1"], "rate_tokens must be at least 2, got 1"),
    ],
)
def test_mistakes_are_told_before_any_work(more, words, tmp_path, capsys):
    sae = story_sae(tmp_path / "sae")
    assert run("eval", str(sae), *SMALL, "--output-dir", str(tmp_path / "out"), *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_sae_without_a_home_asks_for_one(tmp_path, capsys):
    MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=8, num_latents=16, k=2)).save_pretrained(tmp_path / "sae")
    assert run("eval", str(tmp_path / "sae"), *SMALL, "--output-dir", str(tmp_path / "out")) == 2
    assert "does not say which language model it is of; give --model" in capsys.readouterr().err
    assert run("eval", str(tmp_path / "sae"), "--model", "stories", *SMALL, "--site", "layers.1") == 2
    assert re.search(r"8 dimensions, but those at model\.layers\.1:output .* 128", capsys.readouterr().err)


def test_labels_that_cannot_be_used_are_told(lm, tokenizer, tmp_path, capsys):
    sae = story_sae(tmp_path / "sae")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one", "label": "a"}\n{"text": "two"}\n')
    assert run("eval", str(sae), *SMALL, "--labelled", str(broken), "--output-dir", str(tmp_path / "out")) == 2
    assert "broken.jsonl, line 2: expected a JSON object with 'text' and 'label'" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": "the owl", "label": str(i % 2)}) + "\n" for i in range(20)))
    assert run("eval", str(sae), *SMALL, "--labelled", str(few), "--output-dir", str(tmp_path / "out")) == 2
    assert f"0 labels with at least {MIN_EXAMPLES}" in capsys.readouterr().err

"""The model card: its metadata, its tables, and that its snippet runs."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub import render_model_card, write_model_card
from hf_msae.metrics import LevelMetrics, Measurement
from hf_msae.worlds.stories import load_story_lm, story_lm_path

EXTRA = {
    "dataset": "tiny/stories train",
    "training_tokens": 1_234_567,
    "steps": 4_321,
    "learning_rate": 0.00025,
    "tokens_per_second": 98_765.4,
}
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_latents": 1024, "prefix_sizes": [64, 256, 1024], "k": 16}
SITE = "model.layers.2:output"
ORIGIN: dict[str, Any] = {"site": SITE, "base_model": "owner/language-model", "context_length": 256}
LEVELS = [
    LevelMetrics(64, 3.14159, 0.51234, 0.0, 0.61111, 0.51, 1.5),
    LevelMetrics(256, 7.5, 0.7, 0.015625, 0.72222, 0.62, 1.0),
    LevelMetrics(1024, 16.0, 0.83333, 0.25, 0.83339, 0.73, 0.5),
]
MEASUREMENT = Measurement(LEVELS, 100_000, 25_000, 2.34567, 8.76543, 5.5)


def make_config(**changes: Any) -> MatryoshkaSAEConfig:
    return MatryoshkaSAEConfig(**(SHAPE | ORIGIN | changes))


def render(measurement: Measurement = MEASUREMENT, **changes: Any) -> ModelCard:
    return render_model_card(make_config(**changes), measurement, EXTRA, VERSIONS)


def read_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, the ruling line left out."""
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in tables]
    for table in cells:
        assert {len(row) for row in table} == {len(table[0])}
        assert set("".join(table.pop(1))) <= set("-:")
    return cells


def read_snippet(card: ModelCard) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return snippet


def run_snippet(card: ModelCard, folder: Path) -> dict[str, Any]:
    """What the snippet's names hold after it ran, with the SAE's folder where the card leaves a place for it."""
    snippet = read_snippet(card)
    assert snippet.count('"path/or/repo/of/this/model"') == 1
    names: dict[str, Any] = {}
    exec(compile(snippet.replace("path/or/repo/of/this/model", str(folder)), "card", "exec"), names)
    return names


def without_cross_entropy(measurement: Measurement) -> Measurement:
    levels = [LevelMetrics(level.prefix, level.l0, level.fve, level.dead) for level in measurement.levels]
    return Measurement(levels, measurement.tokens)


# Metadata


def test_the_metadata_says_how_to_load_it_and_what_it_explains() -> None:
    assert render().data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "base_model": "owner/language-model",
        "license": "apache-2.0",
        "tags": ["hf_msae", "sparse-autoencoder", "matryoshka-sae", "mechanistic-interpretability"],
    }


def test_the_written_file_reads_as_the_card(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_model_card(path, make_config(), MEASUREMENT, EXTRA, VERSIONS)
    assert path.read_text().startswith("---\n")
    read = ModelCard.load(path)
    assert read.data.to_dict() == render().data.to_dict()
    assert read.text.strip() == render().text.strip()


@pytest.mark.parametrize("path", ["/home/someone/lm", "./lm", "../lm", "/home/someone/models/lm"])
def test_a_path_is_not_given_to_the_hub_as_a_name(path: str) -> None:
    card = render(base_model=path)
    assert "base_model" not in card.data.to_dict()
    assert f"# Matryoshka SAE of lm at `{SITE}`\n" in card.text


def test_a_relative_path_is_not_given_to_the_hub_as_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in render(base_model="models/lm").data.to_dict()


def test_without_a_base_model_the_card_leaves_places_for_it() -> None:
    card = render(base_model=None)
    assert "base_model" not in card.data.to_dict()
    assert f"# Matryoshka SAE of a language model at `{SITE}`\n" in card.text
    snippet = read_snippet(card)
    compile(snippet, "card", "exec")
    assert snippet.count('from_pretrained("the/language/model")') == 2
    assert "None" not in card.text


# Tables and text


def test_the_table_is_the_measurement() -> None:
    assert read_tables(render().text)[0] == [
        ["prefix", "L0", "FVE", "CE recovered", "dead %"],
        ["64", "3.14", "0.512", "0.611", "0.0"],
        ["256", "7.50", "0.700", "0.722", "1.6"],
        ["1,024", "16.00", "0.833", "0.833", "25.0"],
    ]


shares = st.floats(0, 1)
recovered = st.floats(-2, 1) | st.none()
measured_levels = st.lists(st.tuples(st.floats(0, 500), st.floats(-5, 1), shares, recovered), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(measured_levels)
def test_any_measurement_can_be_read_back_from_the_table(
    numbers: list[tuple[float, float, float, float | None]],
) -> None:
    sizes = [1000 * 2**level for level in range(len(numbers))]
    levels = [LevelMetrics(size, *given) for size, given in zip(sizes, numbers, strict=True)]
    table = read_tables(render(Measurement(levels, 5_000), prefix_sizes=sizes, num_latents=sizes[-1]).text)[0]
    assert len(table) == len(numbers) + 1
    for row, size, (l0, fve, dead, ce) in zip(table[1:], sizes, numbers, strict=True):
        assert int(row[0].replace(",", "")) == size
        assert math.isclose(float(row[1]), l0, abs_tol=0.00501)
        assert math.isclose(float(row[2]), fve, abs_tol=0.000501)
        assert math.isclose(float(row[4]), 100 * dead, abs_tol=0.0501)
        assert (row[3] == "–") if ce is None else math.isclose(float(row[3]), ce, abs_tol=0.000501)


def test_the_numbers_come_with_what_they_were_measured_on() -> None:
    text = render().text
    assert "Measured on 100,000 held-out tokens (cross-entropy on 25,000)." in text
    assert "(2.346 nats per token without, 8.765 with the site set to zero)" in text


def test_without_cross_entropy_the_card_says_nothing_of_it() -> None:
    text = render(without_cross_entropy(MEASUREMENT)).text
    assert "Measured on 100,000 held-out tokens. " in text
    assert [row[3] for row in read_tables(text)[0]] == ["CE recovered", "–", "–", "–"]
    assert "nats" not in text
    assert "cross-entropy" not in text


def test_the_facts_of_the_run_are_in_the_card() -> None:
    facts = dict(read_tables(render(level_weights=[1, 1, 2]).text)[1])
    assert facts == {
        "": "",
        "dataset": "tiny/stories train",
        "tokens": "1,234,567 in 4,321 steps",
        "context length": "256",
        "activation": "`batch_topk`, k = 16",
        "prefix sizes": "64, 256, 1024",
        "level weights": "0.25, 0.25, 0.5",
        "peak learning rate": "0.00025",
        "speed": "98,765 tokens/s",
        "versions": "torch 2.13.0+cpu, transformers 5.23.0",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"detach_prefixes": True}, "0.333, 0.333, 0.333, prefixes detached"),
        ({"log_loss": True}, "0.333, 0.333, 0.333, logarithmic"),
        ({"balance": 0.5}, "0.143, 0.286, 0.571"),
    ],
)
def test_the_loss_is_described(options: dict[str, Any], said: str) -> None:
    assert dict(read_tables(render(**options).text)[1])["level weights"] == said


# The snippet


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    """An SAE of the story model's width whose threshold leaves about 16 latents active."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(make_config(base_model=str(story_lm_path())))
    sae.calibrate_threshold([torch.randn(500, 128)])
    return sae.eval()


@pytest.fixture(scope="module")
def folder(sae: MatryoshkaSAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    sae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("measurement", [MEASUREMENT, without_cross_entropy(MEASUREMENT)], ids=["ce", "no ce"])
def test_the_snippet_runs_and_computes_what_it_says(
    measurement: Measurement, sae: MatryoshkaSAE, folder: Path
) -> None:
    """Against the model's own hidden states: `hidden_states[3]` is what layer 2 gives."""
    names = run_snippet(render_model_card(sae.config, measurement, EXTRA, VERSIONS), folder)
    model, tokenizer = load_story_lm()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[3]
        latents = sae.encode(hidden)
        coarse = sae.truncate(64).decode(latents[..., :64])
    assert names["activations"].shape == (1, inputs["input_ids"].shape[1], 128)
    torch.testing.assert_close(names["activations"], hidden)
    assert names["latents"].shape == (1, inputs["input_ids"].shape[1], 1024)
    torch.testing.assert_close(names["latents"], latents)
    assert int((latents > 0).sum()) > 0
    torch.testing.assert_close(names["coarse"], coarse)


def test_the_snippet_of_a_story_sae_runs(sae: MatryoshkaSAE, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `hf-msae train` writes when no model is named."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = run_snippet(render(base_model="stories"), folder)
    assert names["latents"].shape[-1] == 1024


def test_a_repo_without_a_namespace_is_one() -> None:
    assert render(base_model="gpt2").data.to_dict()["base_model"] == "gpt2"

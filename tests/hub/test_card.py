"""The model card: its metadata, its tables, that its snippets run, and that what people write into it stays."""

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
from hf_msae.hub.card import (
    CardFacts,
    choose_latent,
    dataset_name,
    hub_dataset,
    render_collection_card,
    render_collection_part,
    render_model_card,
    write_model_card,
)
from hf_msae.hub.card_parts import CardError, fingerprint, fingerprint_parts, merge_cards, split_card
from hf_msae.hub.index import make_entry
from hf_msae.metrics import LevelMetrics, Measurement
from hf_msae.sites import capture, replace, resolve_site
from hf_msae.worlds.stories import load_story_lm

pytestmark = pytest.mark.slow

EXTRA = {
    "dataset": "tiny/stories train",
    "training_tokens": 1_234_567,
    "steps": 4_321,
    "learning_rate": 0.00025,
    "tokens_per_second": 98_765.4,
}
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
RUN: dict[str, Any] = {"training": EXTRA, "versions": VERSIONS}
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


def make_facts(config: MatryoshkaSAEConfig, source: str = "owner/sae", **changes: Any) -> CardFacts:
    return CardFacts(**({"config": config, "source": source, "measurement": MEASUREMENT} | RUN | changes))


def render(measurement: Measurement | None = MEASUREMENT, **changes: Any) -> ModelCard:
    return ModelCard(render_model_card(make_facts(make_config(**changes), measurement=measurement)))


def read_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, the ruling line left out."""
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in tables]
    for table in cells:
        assert {len(row) for row in table} == {len(table[0])}
        assert set("".join(table.pop(1))) <= set("-:")
    return cells


def read_snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def run_snippet(snippet: str) -> dict[str, Any]:
    """What the snippet's names hold after it ran, as it stands."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "card", "exec"), names)
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
        "base_model_relation": "adapter",
        "datasets": ["tiny/stories"],
        "license": "apache-2.0",
        "tags": ["hf_msae", "sparse-autoencoder", "matryoshka-sae", "mechanistic-interpretability"],
        "model-index": [
            {
                "name": "sae",
                "results": [
                    {
                        "task": {
                            "type": "feature-extraction",
                            "name": f"Reconstruction of owner/language-model at {SITE}",
                        },
                        "dataset": {"name": "tiny/stories train", "type": "tiny/stories"},
                        "metrics": [
                            {"type": "fve", "value": 0.8333, "name": "fraction of variance explained"},
                            {"type": "l0", "value": 16.0, "name": "mean active latents per token (L0)"},
                            {"type": "ce_recovered", "value": 0.8334, "name": "cross-entropy recovered"},
                        ],
                    }
                ],
            }
        ],
    }


def test_the_written_file_reads_as_the_card(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_model_card(path, make_config(), MEASUREMENT, EXTRA, VERSIONS, source="owner/sae")
    assert path.read_text().startswith("---\n")
    read = ModelCard.load(path)
    assert read.data.to_dict() == render().data.to_dict()
    assert read.text == render().text


def test_a_card_without_a_source_is_for_the_reader_of_its_folder(tmp_path: Path) -> None:
    write_model_card(tmp_path / "README.md", make_config(), MEASUREMENT, EXTRA, VERSIONS)
    assert f'MatryoshkaSAE.from_pretrained("{tmp_path}")' in (tmp_path / "README.md").read_text()


def test_only_what_the_hub_has_is_named_as_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert hub_dataset("Salesforce/wikitext wikitext-2-raw-v1 train") == "Salesforce/wikitext"
    for description in ("texts/all.jsonl train", "./my/texts train", f"{tmp_path}/a train", "300 documents in memory"):
        assert hub_dataset(description) is None
    assert dataset_name("/home/someone/texts.txt train") == "texts.txt train"
    assert dataset_name("Salesforce/wikitext train") == "Salesforce/wikitext train"


def test_a_converted_sae_claims_no_licence_and_no_numbers() -> None:
    config = make_config(converted_from="SAELens")
    facts = CardFacts(config, "owner/sae", origin="gpt2-small-res-jb/blocks.8")
    card = ModelCard(render_model_card(facts))
    assert card.data.license is None
    assert card.data.eval_results is None
    assert read_tables(card.text) == []
    assert "No measurement came with this SAE, which was converted from a checkpoint of SAELens, so there" in card.text
    assert "Converted by hf_msae from a checkpoint of SAELens, `gpt2-small-res-jb/blocks.8`." in card.text
    assert "None" not in card.text


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
    snippet, _ = read_snippets(card)
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
        "setting": "value",
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


def test_what_inner_levels_pass_on_is_described() -> None:
    row = "share of inner levels' gradients"
    assert row not in dict(read_tables(render().text)[1])
    said = dict(read_tables(render(inner_decoder_share=0.0, inner_activation_share=0.25).text)[1])[row]
    assert said == "0 to the decoder, 0.25 to latent activations"


def test_the_penalty_and_an_aligned_encoder_are_described() -> None:
    def activation(**options: Any) -> str:
        return dict(read_tables(render(**options).text)[1])["activation"]

    plain = activation()
    assert activation(aligned=True) == f"{plain}, encoder rows aligned with decoder rows"
    l1 = activation(activation="relu")
    assert activation(activation="relu", p_end=0.2) == f"{l1}, penalty Σ f^p with p from 1 to 0.2"


# The snippet


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    """An SAE of the story model's width whose threshold leaves about 16 latents active."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(make_config(base_model="stories"))
    sae.calibrate_threshold([torch.randn(500, 128)])
    with torch.no_grad():
        sae.max_activation[5], sae.firing_rate[5] = 40.0, 0.01
    return sae.eval()


@pytest.mark.parametrize("subfolder", [None, "layers.2"])
def test_the_snippets_of_a_pushed_card_run_and_compute_what_they_say(hub, sae: MatryoshkaSAE, subfolder: str) -> None:
    """Against the model's own hidden states: `hidden_states[3]` is what layer 2 gives."""
    sae.push_to_hub("tester/sae", subfolder=subfolder)
    path = f"{subfolder}/README.md" if subfolder else "README.md"
    with_package, without_package = read_snippets(ModelCard(hub.files("tester/sae")[path].decode()))
    names = run_snippet(with_package)
    model, tokenizer = load_story_lm()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[3]
        latents = sae.encode(hidden)
        coarse = sae.truncate(64).decode(latents[..., :64])
    torch.testing.assert_close(names["activations"], hidden)
    torch.testing.assert_close(names["latents"], latents)
    assert int((latents > 0).sum()) > 0
    torch.testing.assert_close(names["coarse"], coarse)
    assert names["latent"] == 5
    special = torch.tensor(tokenizer.all_special_ids)
    counted = ~torch.isin(inputs.input_ids, special).unsqueeze(-1)  # the prompt's BOS is left as it is

    def edit(x: torch.Tensor) -> torch.Tensor:
        return x + 40 * sae.W_dec[5] * (counted if x.shape[1] > 1 else 1)

    with replace(model, {resolve_site(model, SITE): edit}), torch.no_grad():
        steered = model.generate(**inputs, max_new_tokens=30)
    assert torch.equal(names["generated"], steered)
    assert not torch.equal(steered, model.generate(**inputs, max_new_tokens=30))
    again = run_snippet(without_package)["sae"]
    assert torch.equal(again.W_dec, sae.W_dec)


def test_the_snippet_of_a_tokenized_sae_gives_it_the_tokens(hub) -> None:
    model, tokenizer = load_story_lm()
    torch.manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings
    places = {"base_model": "stories", "site": "model.layers.2:output", "lookup_tokenizer": "/home/someone/tokens"}
    sae = MatryoshkaSAE(make_config(**places, lookup_size=rows)).eval()
    with torch.no_grad():
        sae.W_token.normal_()
        sae.max_activation[5], sae.firing_rate[5] = 40.0, 0.01
    sae.push_to_hub("tester/sae")
    card = hub.files("tester/sae")["README.md"].decode()
    assert f"and a vector of the token itself, one for each of the tokenizer's {rows:,} ids" in card
    names = run_snippet(read_snippets(ModelCard(card))[0])
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    torch.testing.assert_close(names["coarse"], sae.reconstruct_levels(names["activations"], ids)[0])
    assert MatryoshkaSAE.from_pretrained("tester/sae").config.lookup_tokenizer == "path/to/tokens"


@pytest.mark.parametrize("skip", [False, True])
def test_the_snippet_of_a_transcoder_runs_reads_one_place_and_steers_the_other(hub, skip: bool) -> None:
    places = {"site": "model.layers.2.mlp:input", "site_out": "model.layers.2.mlp:output", "hidden_size_out": 128}
    model, tokenizer = load_story_lm()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    sites = [resolve_site(model, places[name]) for name in ("site", "site_out")]
    x, y = capture(model, sites, **inputs).values()
    torch.manual_seed(0)
    sae = MatryoshkaSAE(make_config(base_model="stories", skip=skip, **places)).eval()
    with torch.no_grad():
        sae.calibrate_threshold([x.flatten(0, 1)])
        sae.b_dec.copy_(y.mean((0, 1)))
        if skip:
            sae.W_skip.normal_(0, 0.1)
        sae.max_activation[5], sae.firing_rate[5] = 40.0, 0.01
    sae.push_to_hub("tester/sae")
    card = hub.files("tester/sae")["README.md"].decode()
    assert "# Matryoshka transcoder of" in card
    assert "reconstructs from them the 128-dimensional ones at `model.layers.2.mlp:output`" in card
    assert ("beside a linear map of what it reads" in card) == skip
    names = run_snippet(read_snippets(ModelCard(card))[0])
    torch.testing.assert_close(names["activations"], x)
    torch.testing.assert_close(names["latents"], sae.encode(x))
    torch.testing.assert_close(names["coarse"], sae.reconstruct_levels(x)[0])
    special = torch.tensor(tokenizer.all_special_ids)
    counted = ~torch.isin(inputs.input_ids, special).unsqueeze(-1)

    def edit(h: torch.Tensor) -> torch.Tensor:
        return h + 40 * sae.W_dec[5] * (counted if h.shape[1] > 1 else 1)

    with replace(model, {sites[1]: edit}), torch.no_grad():
        steered = model.generate(**inputs, max_new_tokens=30)
    assert torch.equal(names["generated"], steered)


def test_where_nothing_was_measured_the_snippet_finds_a_latent_itself(hub, sae: MatryoshkaSAE) -> None:
    silent = sae.truncate(256)
    with torch.no_grad():
        silent.max_activation.zero_()
    silent.push_to_hub("tester/sae")
    names = run_snippet(read_snippets(ModelCard(hub.files("tester/sae")["README.md"].decode()))[0])
    assert names["latent"] == int(silent.encode(names["activations"])[0, -1].argmax())
    assert names["generated"].shape[1] > names["inputs"].input_ids.shape[1]


def test_the_snippet_of_another_model_names_it_and_its_commit() -> None:
    snippet, _ = read_snippets(render(base_model_revision="abc123"))
    compile(snippet, "card", "exec")
    assert snippet.count('from_pretrained("owner/language-model", revision="abc123")') == 2
    assert 'MatryoshkaSAE.from_pretrained("owner/sae")' in snippet


def test_the_path_of_the_language_model_is_not_published(tmp_path: Path) -> None:
    config = make_config(base_model=str(tmp_path / "lm"))
    assert 'from_pretrained("path/to/lm")' in render_model_card(make_facts(config))
    assert f'from_pretrained("{tmp_path / "lm"}")' in render_model_card(make_facts(config, source=str(tmp_path)))


def test_the_latent_to_steer_with_is_strong_and_rare() -> None:
    strength = torch.tensor([9.0, 1.0, 3.0, 5.0, 0.0])
    rate = torch.tensor([0.9, 0.01, 0.05, 0.0, 0.0])
    assert choose_latent(strength, rate) == 2
    assert choose_latent(strength, torch.zeros(5)) == 0
    assert choose_latent(torch.zeros(5), torch.zeros(5)) is None


# A repo of several


def entries(*layers: int) -> list[Any]:
    configs = {f"l{layer}": make_config(site=f"model.layers.{layer}:output") for layer in layers}
    for config in configs.values():
        config.measured = {"tokens": 9, "l0": [1, 2, 16.125], "fve": [0.5, 0.6, 0.8125]}
    return [make_entry(name, config) for name, config in configs.items()]


def test_the_root_of_a_collection_lists_what_there_is() -> None:
    card = ModelCard(render_collection_card(entries(2, 10), "owner/saes"))
    header, *rows = read_tables(card.text)[0]
    assert header == ["folder", "site", "latents", "levels", "k", "L0", "FVE"]
    link = "[l10](https://huggingface.co/owner/saes/tree/main/l10)"
    assert rows[1] == [link, "`model.layers.10:output`", "1,024", "3", "16", "16.12", "0.812"]
    assert card.data.base_model == "owner/language-model"
    assert card.data.base_model_relation == "adapter"


def test_the_snippet_of_a_collection_runs(hub, sae: MatryoshkaSAE, capsys: pytest.CaptureFixture[str]) -> None:
    for name, site in (("a", SITE), ("b", "model.layers.3:output")):
        other = sae.truncate(256 if name == "b" else 1024)
        other.config.site = site
        other.push_to_hub("tester/saes", subfolder=name)
    (snippet,) = read_snippets(ModelCard(hub.files("tester/saes")["README.md"].decode()))
    names = run_snippet(snippet)
    assert capsys.readouterr().out.splitlines() == [
        f"a {SITE} 1024 16 None",
        "b model.layers.3:output 256 16 None",
    ]
    assert torch.equal(names["one"].W_dec, sae.W_dec)
    assert list(names["at_one_site"]) == ["a"]


def test_an_sae_at_the_root_lists_those_in_folders(hub, sae: MatryoshkaSAE) -> None:
    sae.push_to_hub("tester/saes")
    assert "The SAEs in this repo" not in hub.files("tester/saes")["README.md"].decode()
    sae.push_to_hub("tester/saes", subfolder="more")
    text = hub.files("tester/saes")["README.md"].decode()
    assert text.startswith("---\n")
    assert "# Matryoshka SAE of the story model" in text
    assert [row[0] for row in read_tables(text)[0]] == [
        "folder", "[more](https://huggingface.co/tester/saes/tree/main/more)",
    ]  # fmt: skip
    sae.push_to_hub("tester/saes")
    assert hub.files("tester/saes")["README.md"].decode() == text


# What people write


def changed(**changes: Any) -> str:
    return render_model_card(make_facts(make_config(**changes)))


def with_edits(card: str, **edits: tuple[str, str]) -> str:
    for before, after in edits.values():
        assert before in card
        card = card.replace(before, after)
    return card


def test_an_untouched_card_becomes_the_new_one() -> None:
    old, new = changed(), changed(k=8, base_model="other/lm")
    assert old != new
    assert merge_cards(old, new) == new
    assert merge_cards(old, old) == old


def test_text_around_the_parts_stays_and_the_parts_change() -> None:
    old = changed().replace("<!-- hf_msae:end results -->", "<!-- hf_msae:end results -->\n\nMind the owls.\n")
    merged = merge_cards(old, changed(k=8))
    assert "Mind the owls." in merged
    assert "about 8 of them" in merged
    assert merged.replace("\n\nMind the owls.\n", "") == changed(k=8)


def test_an_edited_part_stays_whatever_comes() -> None:
    old = with_edits(changed(), summary=("explains each token", "explains (as we showed) each token"))
    once = merge_cards(old, changed(k=8))
    assert "about 16 of them" in once
    assert "k = 8 |" in once
    assert "about 16 of them" in merge_cards(once, changed(k=4))


def test_a_removed_part_stays_away() -> None:
    old = re.sub(r"<!-- hf_msae:begin limits .*?hf_msae:end limits -->\n", "", changed(), flags=re.DOTALL)
    assert "## Limits" not in old
    assert "## Limits" not in merge_cards(old, changed(k=8))


def test_blanks_at_line_ends_and_line_breaks_of_another_system_are_no_edit() -> None:
    old = changed().replace("\n", "\r\n").replace("Special tokens take no part.", "Special tokens take no part.  ")
    merged = merge_cards(old, changed(k=8))
    assert "about 8 of them" in merged
    assert "\r\n" in merged
    assert merged.replace("\r\n", "\n") == changed(k=8)


def test_metadata_changes_only_where_it_was_ours() -> None:
    old = with_edits(
        changed(),
        licence=("license: apache-2.0", "license: mit"),
        tag=("- hf_msae\n", "- hf_msae\n- owls\n"),
        gone=("pipeline_tag: feature-extraction\n", ""),
        more=("library_name:", "language: en\nlibrary_name:"),
    )
    metadata, _ = split_card(merge_cards(merge_cards(old, changed(k=8)), changed(base_model="other/lm")))
    fresh, _ = split_card(changed(base_model="other/lm"))
    assert metadata == {
        **{key: value for key, value in fresh.items() if key != "pipeline_tag"},
        "license": "mit",
        "tags": ["hf_msae", "owls", *fresh["tags"][1:]],
        "language": "en",
    }


def test_metadata_that_no_longer_holds_goes() -> None:
    unmeasured = render_model_card(make_facts(make_config(), measurement=None))
    metadata, _ = split_card(merge_cards(changed(), unmeasured))
    assert "model-index" not in metadata
    metadata, _ = split_card(merge_cards(unmeasured, changed()))
    assert metadata["model-index"][0]["name"] == "sae"


def test_metadata_that_needs_no_change_keeps_its_form() -> None:
    old = changed().replace("license: apache-2.0", "license:    'apache-2.0'   # as agreed")
    merged = merge_cards(old, changed(detach_prefixes=True))
    assert "license:    'apache-2.0'   # as agreed\n" in merged
    assert "prefixes detached" in merged


def test_a_card_of_somebodys_own_is_not_touched() -> None:
    own = "---\nlicense: mit\n---\n# My owls\n"
    assert merge_cards(own, changed()) == own


def test_a_card_without_text_keeps_its_metadata() -> None:
    metadata, body = split_card(merge_cards("---\nlicense: gpl-3.0\n---\n", changed()))
    assert metadata["license"] == "gpl-3.0"
    assert metadata["library_name"] == "transformers"
    assert "# Matryoshka SAE of" in body
    # And the licence is still theirs at the next push.
    again, _ = split_card(merge_cards(merge_cards("---\nlicense: gpl-3.0\n---\n", changed()), changed(k=8)))
    assert again["license"] == "gpl-3.0"


@pytest.mark.parametrize(("front", "said"), [("a: [1", "no valid YAML"), ("- 1", "must be `key: value` lines")])
def test_metadata_that_cannot_be_read_is_refused(front: str, said: str) -> None:
    with pytest.raises(CardError, match=said):
        merge_cards(f"---\n{front}\n---\n{split_card(changed())[1]}", changed())


def test_the_list_alone_can_be_brought_up_to_date() -> None:
    old = render_collection_card(entries(2), "owner/saes")
    merged = merge_cards(old, render_collection_part(entries(2, 10), "owner/saes"))
    assert split_card(merged)[0] == split_card(old)[0]
    assert len(read_tables(merged)[0]) == 3
    assert merged.split("<!-- hf_msae:begin collection")[0] == old.split("<!-- hf_msae:begin collection")[0]


words = st.text("ab #|-<>!\n`", max_size=40)


@settings(max_examples=50, deadline=None)
@given(words, words, words, st.sampled_from([0, 1]))
def test_any_text_around_the_parts_survives_any_number_of_pushes(
    before: str, between: str, after: str, which: int
) -> None:
    body = (
        "<!-- hf_msae:begin x -->\none\n<!-- hf_msae:end x -->@<!-- hf_msae:begin y -->\ntwo\n<!-- hf_msae:end y -->"
    )
    old, new = (
        fingerprint_parts({"a": 1}, body),
        fingerprint_parts({"a": 2}, body.replace("one", "three").replace("two", "four")),
    )
    head, rest = old.split("<!-- hf_msae:begin x", 1)
    theirs = head + before + "<!-- hf_msae:begin x" + rest.replace("@", between) + after
    kept = ["one", "two"][which]
    theirs = theirs.replace(f"\n{kept}\n", f"\n{kept} edited\n")
    merged = merge_cards(merge_cards(theirs, new), new)
    assert merged == merge_cards(theirs, new)
    x, y = ("one edited", "four") if which == 0 else ("three", "two edited")
    parts = re.fullmatch(
        r".*?-->\n(?P<before>.*)<!-- hf_msae:begin x sha256=\w+ -->\n(?P<x>.*)\n<!-- hf_msae:end x -->(?P<between>.*)"
        r"<!-- hf_msae:begin y sha256=\w+ -->\n(?P<y>.*)\n<!-- hf_msae:end y -->(?P<after>.*)",
        merged,
        flags=re.DOTALL,
    )
    assert parts is not None
    assert parts.groupdict() == {"before": before, "x": x, "between": between, "y": y, "after": after}


def test_the_fingerprint_is_of_the_text() -> None:
    """`printf 'a\nb' | sha256sum`"""
    assert fingerprint("\na  \nb\n") == "7e18f737311b2dc3"


def test_a_repo_without_a_namespace_is_one() -> None:
    assert render(base_model="gpt2").data.to_dict()["base_model"] == "gpt2"

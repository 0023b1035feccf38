"""What is written for Neuronpedia holds what the pages hold, in records with exactly the fields of theirs.

The field names are those of Neuronpedia's `db_models` (in its repository, 2025), copied by hand: the oracle is the
list, since no instance of Neuronpedia runs here.
"""

import gzip
import json
from pathlib import Path

import pytest

from hf_msae.cli.main import main
from hf_msae.formats import neuronpedia as module
from hf_msae.formats.neuronpedia import NeuronpediaNames, layer_of, write_neuronpedia
from hf_msae.interpret import Interpretation, Label, interpret

FIELDS = {
    "features": """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel hookName
        topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
        correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
        correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
        freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
        decoder_weights_dist""",
    "activations": """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
        dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax
        binContains qualifyingTokenIndex""",
    "explanations": """id modelId layer index description authorId embedding triggeredById typeName
        explanationModelName notes createdAt""",
}
NAMES = NeuronpediaNames("tiny-1m", 0, "me-res-18", "Me", "my-release", "My release", url="https://example.org")


@pytest.fixture(scope="module")
def found(known, tmp_path_factory) -> Interpretation:
    folder = tmp_path_factory.mktemp("pages") / "interpretation"
    options = {"max_tokens": 10**6, "packing": False, "top_contexts": 3, "sampled_contexts": 8}
    made = interpret(known.model, known.tokenizer, known.sae, known.texts, folder, **options)
    made.save_labels({7: Label("the word w1")})
    return made


def lines(folder: Path) -> list[dict]:
    """The records of all batches, in the order of their numbers."""
    paths = sorted(folder.glob("batch-*.jsonl.gz"), key=lambda path: int(path.name[6:-9]))
    return [json.loads(line) for path in paths for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@pytest.mark.parametrize("batch", [5, 1024])
def test_records_hold_what_the_pages_hold(found, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(module, "BATCH", batch)
    place = write_neuronpedia(found, NAMES, tmp_path)
    assert place == tmp_path / "tiny-1m" / "0-me-res-18"
    records = {kind: lines(place / kind) for kind in FIELDS}
    for kind, fields in FIELDS.items():
        assert {frozenset(record) for record in records[kind]} == {frozenset(fields.split())}
        assert {(record["modelId"], record["layer"]) for record in records[kind]} == {("tiny-1m", "0-me-res-18")}
    assert [feature["index"] for feature in records["features"]] == [str(latent) for latent in range(18)]
    assert len(list((place / "features").iterdir())) == -(-18 // batch)
    for page, feature in zip(found, records["features"], strict=True):
        assert feature["frac_nonzero"] == page.firing_rate
        assert feature["maxActApprox"] == pytest.approx(page.max_activation, abs=1e-4)
        assert feature["pos_str"] == [effect.token for effect in page.promoted]
        assert feature["neg_values"] == pytest.approx([effect.effect for effect in page.suppressed], abs=1e-4)
        assert feature["topkCosSimIndices"] == [other.latent for other in page.nearest]
        assert sum(feature["freq_hist_data_bar_heights"]) == sum(page.histogram)
        assert all(0 < value < page.histogram_range for value in feature["freq_hist_data_bar_values"])
        own = [record for record in records["activations"] if record["index"] == str(page.latent)]
        assert [record["tokens"] for record in own] == [list(c.tokens) for c in [*page.top, *page.sampled]]
        for record, context in zip(own, [*page.top, *page.sampled], strict=True):
            assert record["values"] == pytest.approx(context.activations, abs=1e-4)
            assert record["values"][record["maxValueTokenIndex"]] == record["maxValue"] == max(record["values"])
            assert record["tokens"][record["qualifyingTokenIndex"]] == context.peak_token
    keys = [record["id"] for kind in ("activations", "explanations") for record in records[kind]]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 25 for key in keys)
    (label,) = records["explanations"]
    assert (label["index"], label["description"]) == ("7", "the word w1")


def test_headers_belong_together(found, tmp_path):
    place = write_neuronpedia(found, NAMES, tmp_path)
    release, model, source_set, source = (
        json.loads((place / f"{name}.jsonl").read_text()) for name in ("release", "model", "sourceset", "source")
    )
    assert (release["name"], release["urls"], release["creatorName"]) == ("my-release", ["https://example.org"], "Me")
    assert model["id"] == source_set["modelId"] == source["modelId"] == "tiny-1m"
    assert source_set["name"] == source["setName"] == "me-res-18"
    assert source_set["releaseName"] == release["name"]
    assert source["id"] == "0-me-res-18"
    assert source["num_tokens_in_prompt"] == found.source.context_length
    assert len({record["creatorId"] for record in (release, model, source_set, source)}) == 1


def test_nothing_is_half_written_or_overwritten(found, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_activations", lambda page, names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_neuronpedia(found, NAMES, tmp_path)
    assert not list((tmp_path / "tiny-1m").iterdir())
    place = write_neuronpedia(found, NAMES, tmp_path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError):
        write_neuronpedia(found, NAMES, tmp_path)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("model.layers.12:output", 12),
        ("transformer.h.3.mlp:output", 3),
        ("gpt_neox.layers.0.attention.dense:input", 0),
        ("model.embed_tokens:output", None),
        (None, None),
    ],
)
def test_the_layer_of_a_site(site, layer):
    assert layer_of(site) == layer


def command(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["neuronpedia", *arguments])
    return ended.value.code, " ".join("".join(capsys.readouterr()).split())


def test_the_command_says_what_it_needs(found, tmp_path, capsys):
    given = ["--source-set", "me-res", "--creator", "Me"]
    folder = str(found.folder)
    (tmp_path / "empty").mkdir()
    code, words = command(capsys, str(tmp_path / "empty"), str(tmp_path / "out"), *given)
    assert code == 2
    assert "hf-msae interpret" in words
    code, words = command(capsys, folder, str(tmp_path / "out"), *given, "--model-name", "tiny")
    assert code == 2
    assert "does not say which layer it is in; give --layer" in words
    code, words = command(capsys, folder, str(tmp_path / "out"), *given, "--model-name", "a/b", "--layer", "1")
    assert code == 2
    assert "'a/b' cannot be the name of a model on Neuronpedia" in words
    assert not (tmp_path / "out").exists()
    code, words = command(capsys, folder, str(tmp_path / "out"), *given, "--model-name", "tiny", "--layer", "1")
    assert code == 0, words
    assert f"Wrote 18 latents to {tmp_path}/out/tiny/1-me-res" in words

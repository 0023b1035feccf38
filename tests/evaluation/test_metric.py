"""A metric that nobody foresaw, added as one class: it is measured, and stands in the tables and in the report.

Nothing else has to change for it: this file is the only one that knows it.
"""

import json
from dataclasses import dataclass

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.evaluation import (
    DEFAULT_METRICS,
    METRICS,
    Details,
    Metric,
    Plot,
    Subject,
    collect,
    evaluate,
    write_report,
)
from hf_msae.evaluation.suite import find_metrics
from hf_msae.evaluation.tables import Column, all_tables, field_at_prefix, table_by_prefix
from hf_msae.sites import resolve_site


@dataclass(frozen=True)
class Sharing:
    prefix: int
    tokens: int
    sharing: float


class SharedTopToken(Metric[dict[str, list[Sharing]]]):
    """The mean number of active latents that share their top token with another active one. A latent's top token is
    the one on which it is most active.
    """

    name = "shared_top_token"

    def measure(self, inputs):
        return {
            name: [self._measure(inputs.text, sae, m) for m in sae.config.prefix_sizes]
            for name, sae in inputs.saes.items()
        }

    def _measure(self, text, sae, prefix):
        latents = torch.cat([sae.encode(x) for x in text.batches(sae)])[:, :prefix]
        top = text.token_ids[latents.argmax(0)]
        active = (latents > 0).long()
        by_token = torch.zeros(len(active), int(top.max()) + 1, dtype=torch.int64).index_add_(1, top, active)
        return Sharing(prefix, len(active), by_token[by_token > 1].sum().item() / len(active))

    def tables(self, result, evaluation):
        column = Column("share a top token", field_at_prefix(result, "sharing"), 2)
        tokens = next(iter(result.values()))[0].tokens
        return [table_by_prefix(evaluation, "Shared top tokens", f"On {tokens:,} tokens.", [column])]

    def plots(self, result, evaluation):
        def draw(figure):
            of = next(iter(result.values()))
            figure.subplots().plot([item.prefix for item in of], [item.sharing for item in of])

        return [Plot("Latents that share a top token, by prefix.", draw)]


class OfConcepts(SharedTopToken):
    name = "of_concepts"
    needs_labels = True


class Nothing(SharedTopToken):
    name = "nothing"

    def measure(self, inputs):
        return None


class OtherCore(SharedTopToken):
    name = "core"


def make_sae(text, seed: int) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4)
    sae = MatryoshkaSAE(config).eval()
    sae.calibrate_threshold([text.x])
    return sae


@pytest.fixture(scope="module")
def text(lm, tokenizer, texts):
    return collect(lm, tokenizer, resolve_site(lm, "layers.0"), texts, num_tokens=300, context_length=16)


@pytest.fixture(scope="module")
def evaluation(text):
    subjects = [Subject("one", "method", make_sae(text, 0)), Subject("two", "method", make_sae(text, 1))]
    metrics = [SharedTopToken(), "geometry", OfConcepts(), Nothing()]
    return evaluate(subjects, text, metrics=metrics, ce_tokens=0, rate_tokens=50)


def count_by_hand(text, sae, prefix) -> float:
    """The definition, token by token."""
    ids = text.token_ids.tolist()
    latents = sae.encode(text.x)[:, :prefix].tolist()
    top = [ids[max(range(len(ids)), key=lambda token: latents[token][j])] for j in range(prefix)]
    total = 0
    for values in latents:
        tokens = [top[j] for j in range(prefix) if values[j] > 0]
        total += sum(tokens.count(token) > 1 for token in tokens)
    return total / len(ids)


def test_a_metric_of_ones_own_is_measured(evaluation, text):
    for name, seed in (("one", 0), ("two", 1)):
        for item in evaluation["shared_top_token"][name]:
            assert item.sharing == pytest.approx(count_by_hand(text, make_sae(text, seed), item.prefix))
    assert evaluation["shared_top_token"]["one"][-1].sharing > 0


def test_its_rows_stand_behind_those_of_the_package(evaluation):
    tables = all_tables(evaluation)
    titles = ["Reconstruction", "Geometry", "Agreement across seeds", "Shared top tokens"]
    assert [table.title for table in tables] == titles
    found = [[of[level].sharing for of in evaluation["shared_top_token"].values()] for level in (0, 1)]
    cells = [f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}" for a, b in found]
    assert tables[-1].header == ["SAE", "prefix", "share a top token"]
    assert tables[-1].rows == [["method (2 seeds)", "8", cells[0]], ["method (2 seeds)", "32", cells[1]]]


def test_its_numbers_and_its_picture_are_in_the_report(evaluation, tmp_path):
    write_report(evaluation, tmp_path)
    contents = json.loads((tmp_path / "evaluation.json").read_text())
    # Behind the keys that the file has always had, whatever was measured.
    assert list(contents) == [
        "facts", "methods", "core", "geometry", "agreement", "probing", "absorption", "erasure", "progressive",
        "stitching", "meta", "hedging", "shared_top_token",
    ]  # fmt: skip
    assert contents["shared_top_token"]["two"][1] == vars(evaluation["shared_top_token"]["two"][1])
    assert (contents["probing"], contents["absorption"]) == (None, {})
    page = (tmp_path / "report.html").read_text()
    assert "<h1>one</h1>" in page
    assert page.count("<svg") == 3 + 1
    assert page.index("Shared top tokens</h2>") < page.index("Latents that share a top token, by prefix.</figcaption>")


def test_what_had_nothing_to_be_measured_on_is_left_out(evaluation):
    """A metric of concepts without labelled examples, and one that says so itself."""
    assert [metric.name for metric in evaluation.metrics] == ["core", "geometry", "shared_top_token"]


def test_details_get_a_section_of_their_own(evaluation, tmp_path):
    class WithDetails(SharedTopToken):
        def details(self, result, evaluation):
            (tmp_path / "part.html").write_text("<p>{{ word }}</p>")
            return Details("Part", "A part", tmp_path / "part.html", {"word": "a < b"})

    evaluation.metrics[-1] = WithDetails()
    write_report(evaluation, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<a href="#details">Part</a>' in page
    assert '<h2 id="details">A part</h2>\n<p>a &lt; b</p>' in page


def test_names_are_found_in_the_order_of_the_report():
    found = find_metrics(["hedging", SharedTopToken(), "meta", "probing", "hedging", "progressive"])
    assert [metric.name for metric in found] == ["probing", "progressive", "meta", "hedging", "shared_top_token"]
    assert [metric.name for metric in find_metrics(METRICS)] == list(METRICS)
    assert set(DEFAULT_METRICS) < set(METRICS)


def test_mistakes_are_told_before_anything_is_measured():
    with pytest.raises(InputError, match=r"no metric 'cores'; there are core, geometry, .*, hedging"):
        evaluate([], None, metrics=["cores"])
    with pytest.raises(InputError, match="Two metrics are called 'core'"):
        evaluate([], None, metrics=[OtherCore()])


def test_the_attributes_of_the_version_before_go_on(evaluation):
    with pytest.warns(DeprecationWarning, match=r"evaluation.core is now evaluation\['core'\]"):
        assert evaluation.core is evaluation["core"]
    with pytest.warns(DeprecationWarning, match="agreement"):
        assert evaluation.agreement[0].one == "one"
    with pytest.raises(AttributeError, match="no 'cores'"):
        _ = evaluation.cores
    with pytest.raises(KeyError):
        evaluation["cores"]

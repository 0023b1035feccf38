"""One population: the tokens that an SAE is trained on are those that it is calibrated, measured and described on.

A word is made an attention sink: its embedding is 300 times as long. To one tokenizer it is a word like others, which
the limit of the norm has to find; to the other it is a special token, which never counts. Nothing else differs, so
neither may any number.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import (
    ActivationStream,
    CachedActivations,
    TokenWindows,
    as_documents,
    cache_activations,
    collate,
    find_norm_limits,
    harvest,
    pad_id,
)
from hf_msae.evaluation.activations import collect
from hf_msae.evaluation.baselines import build_random
from hf_msae.evaluation.core import measure_core
from hf_msae.interpret.scan import scan
from hf_msae.metrics import ReconstructionMeter
from hf_msae.outliers import within_limit
from hf_msae.sites import resolve_site
from hf_msae.training import SAETrainer, SAETrainingArguments

pytestmark = pytest.mark.slow

SINK, TIMES = "w7", 300.0
SITES = ("layers.0", "layers.1")


@pytest.fixture(scope="module")
def sunk(lm, build_tokenizer):
    """The model, and the tokenizers to which the sink is a word and a special token."""
    model, word, special = copy.deepcopy(lm), build_tokenizer(), build_tokenizer()
    model.model.embed_tokens.weight.data[word.convert_tokens_to_ids(SINK)] *= TIMES
    special.add_special_tokens({"additional_special_tokens": ["<|mark|>", SINK]})
    return SimpleNamespace(model=model, word=word, special=special)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(60, (900, 30), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in drawn.tolist()]


def make_sae(site: str, **changes) -> MatryoshkaSAE:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_latents": 48, "prefix_sizes": [12, 48], "k": 4, "site": site} | changes
    return MatryoshkaSAE(MatryoshkaSAEConfig(**shape))


def train(sunk, tokenizer, texts, output_dir, saes=None, **changes) -> SAETrainer:
    settings = {"max_steps": 60, "per_device_train_batch_size": 256, "logging_steps": 20, "save_steps": 0}
    settings |= {"eval_tokens": 3000, "calibration_tokens": 2000, "ce_tokens": 1000, "context_length": 31}
    settings |= {"use_cpu": True, "disable_tqdm": True, "output_dir": str(output_dir)} | changes
    saes = make_sae("layers.0") if saes is None else saes
    trainer = SAETrainer(sunk.model, saes, SAETrainingArguments(**settings), texts, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def runs(sunk, documents, tmp_path_factory):
    """`found`: the sink is a word, with the usual arguments. `special`: it is a special token. `unfiltered`: it is a
    word, and all tokens count.
    """
    folder = tmp_path_factory.mktemp("population")
    kinds = {
        "found": (sunk.word, {}),
        "special": (sunk.special, {}),
        "unfiltered": (sunk.word, {"norm_outlier_multiple": 0}),
    }
    for name, (tokenizer, changes) in kinds.items():
        train(sunk, tokenizer, documents, folder / name, **changes)
    return folder


def read(folder):
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return MatryoshkaSAE.from_pretrained(folder), json.loads((folder / "metrics.json").read_text()), log


def test_a_run_is_the_same_as_if_the_sink_never_counted(runs):
    (found, numbers, log), (special, expected, expected_log) = read(runs / "found"), read(runs / "special")
    for ours, theirs in zip(log, expected_log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
    for ours, theirs in zip(numbers["levels"], expected["levels"], strict=True):
        for name, tolerance in {"fve": 0.02, "l0": 0.2, "kl": 0.02, "cosine": 0.02}.items():
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name
    assert expected["outliers"] == expected["training_outliers"] == 0
    share = numbers["outliers"] / (numbers["tokens"] + numbers["outliers"])
    assert share == pytest.approx(1 / 60, abs=0.01)
    assert numbers["training_outliers"] > 0
    ratio = found.max_activation.max() / special.max_activation.max()
    assert 0.7 < ratio < 1.4
    assert found.config.norm_limit == pytest.approx(special.config.norm_limit, rel=0.02)


def test_without_a_limit_the_sink_rules_every_number(runs):
    _, expected, _ = read(runs / "special")
    sae, numbers, _ = read(runs / "unfiltered")
    assert sae.config.norm_limit == 0
    assert numbers["outliers"] == 0
    assert abs(numbers["levels"][-1]["fve"] - expected["levels"][-1]["fve"]) > 0.03
    assert sae.max_activation.max() > 20 * read(runs / "special")[0].max_activation.max()


def test_measured_alike_on_the_same_windows(runs, sunk, documents):
    """Exactly: activations, FVE, maxima, firing rates, cross-entropy."""
    sae, _, _ = read(runs / "found")
    site, limit = resolve_site(sunk.model, sae.config.site), sae.config.norm_limit
    results = {}
    for name, tokenizer in (("word", sunk.word), ("special", sunk.special)):
        windows = list(TokenWindows(documents[:60], tokenizer, context_length=31))
        meter = ReconstructionMeter(sae, limit)
        for batch in harvest(sunk.model, [site], windows, lm_batch_size=8):
            meter.update(batch[site])
        batches = [collate(windows[:20], pad_id(tokenizer))]
        results[name] = meter, measure_cross_entropy(sunk.model, site, sae, meter.mean, batches, limit)
    (word, ce), (special, other_ce) = results["word"], results["special"]
    assert (word.num_outliers > 0, special.num_outliers) == (True, 0)
    assert word.num_tokens == special.num_tokens
    assert word.levels() == special.levels()
    assert torch.equal(word.max_activation, special.max_activation)
    assert (ce.ce_tokens, ce.ce_clean, ce.ce_zero) == (other_ce.ce_tokens, other_ce.ce_clean, other_ce.ce_zero)
    assert [level.kl for level in ce.levels] == [level.kl for level in other_ce.levels]


def test_pages_are_those_of_the_same_tokens(runs, sunk, documents):
    sae, _, _ = read(runs / "found")
    word, special = (
        scan(sunk.model, tokenizer, sae, documents[:60], max_tokens=10**6) for tokenizer in (sunk.word, sunk.special)
    )
    assert (word.num_outliers > 0, special.num_outliers) == (True, 0)
    assert word.norm_limit == sae.config.norm_limit
    assert word.num_tokens == special.num_tokens
    for name in ("count", "total", "maximum", "histogram"):
        assert torch.equal(getattr(word.statistics, name), getattr(special.statistics, name)), name
    for ours, theirs in zip(word.top.contexts, special.top.contexts, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(word.firings.active.values, special.firings.active.values)
    assert torch.equal(word.references, special.references)


def test_an_evaluation_and_its_baselines_leave_the_sink_out(runs, sunk, documents):
    """Also where the SAE records no limit, as another library's: then it is found on the text."""
    sae, numbers, _ = read(runs / "found")
    site = resolve_site(sunk.model, sae.config.site)
    fve = {}
    for name, limit in (("recorded", sae.config.norm_limit), ("not recorded", None), ("none", 0.0)):
        text = collect(sunk.model, sunk.word, site, documents, num_tokens=4000, context_length=31, norm_limit=limit)
        assert (text.num_outliers > 0) == (name != "none")
        assert len(text.x) == sum(int(window.keep.sum()) for window in text.windows)
        assert bool(within_limit(text.x, sae.config.norm_limit).all()) == (name != "none")
        saes = {"sae": sae, "random": build_random(text.x, sae.config, 0)}
        core = measure_core(text, saes, ce_tokens=500, rate_tokens=500)
        assert core["sae"].measurement.outliers == text.num_outliers
        fve[name] = {key: result.measurement.levels[-1].fve for key, result in core.items()}
    assert fve["recorded"] == pytest.approx(fve["not recorded"], abs=1e-3)
    assert fve["recorded"]["sae"] == pytest.approx(numbers["levels"][-1]["fve"], abs=0.03)
    assert fve["recorded"]["random"] < fve["recorded"]["sae"] - 0.1
    assert fve["none"]["sae"] < fve["recorded"]["sae"] - 0.2


def test_each_sae_of_a_grid_has_its_sites_limit(sunk, documents, tmp_path):
    trainer = train(sunk, sunk.word, documents, tmp_path / "grid", [make_sae(site) for site in SITES], max_steps=4)
    assert len({sae.config.norm_limit for sae in trainer.saes.values()}) == 2


def test_a_run_that_goes_on_keeps_its_limits(sunk, documents, tmp_path):
    """Found anew on a device that rounds differently, a limit would be another; so it is not found anew."""
    train(sunk, sunk.word, documents, tmp_path / "run", max_steps=40, save_steps=20)
    whole = read(tmp_path / "run")[0]
    checkpoint = str(tmp_path / "run" / "checkpoint-20")
    changes = {"max_steps": 40, "save_steps": 20, "resume_from_checkpoint": checkpoint}
    trainer = train(sunk, sunk.word, documents, tmp_path / "run", **changes)
    (again,) = trainer.saes.values()
    for (name, ours), theirs in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_first_token_of_windows_without_bos_is_found(lm, documents, build_tokenizer, tmp_path):
    """As of models that begin with no BOS, whose first token is the sink whatever it is."""
    model, tokenizer = copy.deepcopy(lm), build_tokenizer(bos=False)

    def sink(module, args, output):
        hidden = output.clone()
        hidden[:, 0] = 200 * hidden[:, 0]
        return hidden

    model.model.layers[0].register_forward_hook(sink)
    trainer = train(SimpleNamespace(model=model), tokenizer, documents, tmp_path / "run", max_steps=10)
    _, numbers, _ = read(tmp_path / "run")
    # A window is 31 tokens, of which the first is left out.
    assert numbers["outliers"] == pytest.approx(numbers["tokens"] / 30, rel=0.05)
    assert trainer.loader.num_outliers > 0


def test_a_cache_says_by_what_limit_it_was_written(sunk, documents, tmp_path):
    site = resolve_site(sunk.model, "layers.0")
    windows = TokenWindows(as_documents(documents), sunk.word, context_length=31)
    limits = find_norm_limits(sunk.model, [site], windows)
    stream = ActivationStream(sunk.model, [site], windows, batch_size=256, norm_limits=limits)
    folder = cache_activations(stream, tmp_path / "cache", max_tokens=15_000)
    cache = CachedActivations(folder, batch_size=256)
    assert cache.norm_limit(site) == limits[site]
    assert cache.index["num_outliers"] == stream.num_filtered > 0
    sae = make_sae(str(site))
    args = SAETrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=5,
        per_device_train_batch_size=256,
        eval_tokens=1000,
        calibration_tokens=1000,
        use_cpu=True,
        disable_tqdm=True,
    )
    SAETrainer(None, sae, args, cache).train()
    assert sae.config.norm_limit == limits[site]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_do_not_overflow(dtype):
    x = torch.full((3, 4096), 300.0, dtype=dtype)  # its squares are beyond float16
    x[1] *= 0.01
    assert within_limit(x, 1000.0).tolist() == [False, True, False]
    assert within_limit(x, 0).all()
    assert within_limit(x, None).all()


def test_what_is_not_finite_is_not_left_out_in_silence():
    x = torch.ones(3, 4)
    x[0, 0], x[1, 0] = torch.nan, torch.inf
    assert within_limit(x, 10.0).all()

"""Training transcoders: what they are trained on, that runs resume exactly, and what is refused before long work."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_runs import make_sae, make_trainer
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import ActivationStream, CachedActivations, TokenWindows, as_documents, cache_activations
from hf_msae.errors import InputError
from hf_msae.sites import SiteError, capture, replace, resolve_site
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.grid import make_saes
from hf_msae.training.warm_start import WarmStartError, warm_start

pytestmark = pytest.mark.slow

MLP = {"site": "layers.0.mlp:input", "site_out": "layers.0.mlp"}
# 16 numbers to 24: what the MLP's last projection reads.
WIDER = {"site": "layers.0.mlp:input", "site_out": "layers.0.mlp.down_proj:input", "hidden_size_out": 24}
FORMS = {
    "plain": MLP,
    "wider": WIDER,
    "skip": {**WIDER, "skip": True},
    "jumprelu": {**MLP, "activation": "jumprelu", "skip": True},
    "relu": {**WIDER, "activation": "relu"},
    "pareto": {**MLP, "prefix_sampling": "pareto", "num_sampled_prefixes": 3},
}


class Stop(TrainerCallback):
    """Ends the process's work after three quarters of the run, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ConnectionAbortedError("crash")


@pytest.mark.parametrize("form", FORMS)
def test_a_crashed_run_resumes_to_the_same_bits(form, tmp_path, lm, tokenizer, texts):
    make_trainer(lm, tokenizer, texts, tmp_path / "whole", make_sae(**FORMS[form])).train()
    crashing = make_trainer(lm, tokenizer, texts, tmp_path / "run", make_sae(**FORMS[form]), callbacks=[Stop()])
    with pytest.raises(ConnectionAbortedError):
        crashing.train()
    resumed = make_trainer(lm, tokenizer, texts, tmp_path / "run", make_sae(**FORMS[form]))
    resumed.train(resume_from_checkpoint="last")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text())["levels"] for name in ("run", "whole"))
    assert ours == theirs


def test_it_begins_at_the_targets_mean_and_takes_the_inputs_mean_off(tmp_path, lm, tokenizer, texts):
    trainer = make_trainer(lm, tokenizer, texts, tmp_path, make_sae(**FORMS["skip"], apply_b_dec_to_input=True))
    generator = torch.Generator().manual_seed(3)
    x, y = (scale * torch.randn(512, width, generator=generator) + 5 for scale, width in ((0.01, 16), (20.0, 24)))
    trainer.plan()
    learners = _learners(trainer)
    learner = learners[0]
    learner.start(x, y)
    sae = learner.sae
    torch.testing.assert_close(sae.b_dec, y.mean(0))
    torch.testing.assert_close(sae.pre_activations(x.mean(0)), torch.zeros(64), atol=1e-3, rtol=0)
    assert not sae.W_skip.any()
    # As large as for an SAE: latents are in units of what is written, whatever is read.
    spread = sae.pre_activations(x).std() / y.std()
    assert 0.2 < spread < 0.4
    groups = learner.optimizer.param_groups
    rates = {id(parameter): group["peak_lr"] for group in groups for parameter in group["params"]}
    assert rates[id(sae.W_enc)] / rates[id(sae.W_dec)] == pytest.approx((y.std() / x.std()).item(), rel=0.05)
    assert rates[id(sae.W_skip)] == rates[id(sae.W_enc)]
    assert rates[id(sae.b_dec)] == pytest.approx(rates[id(sae.W_dec)] * y.std().item(), rel=0.05)


def _learners(trainer):
    from hf_msae.training.learner import make_learners
    from hf_msae.training.schedules import Length

    return make_learners(trainer.run, trainer.saes, trainer.sites, Length(8), trainer.output_sites)


def test_measured_numbers_are_those_of_the_other_site(tmp_path, lm, tokenizer, texts):
    """FVE of the MLP's output, and the cross-entropy of the model with the MLP replaced, computed by hand."""
    trainer = make_trainer(lm, tokenizer, texts, tmp_path, make_sae(**MLP), ce_tokens=200, norm_outlier_multiple=None)
    (measurement,) = trainer.train().values()
    sae = MatryoshkaSAE.from_pretrained(tmp_path)
    assert (sae.config.site, sae.config.site_out) == ("model.layers.0.mlp:input", "model.layers.0.mlp:output")
    site, site_out = (resolve_site(lm, name) for name in (sae.config.site, sae.config.site_out))
    held_out = trainer.evaluator.held_out
    batches = list(held_out.evaluation())
    x, y = (torch.cat([batch[place] for batch in batches]) for place in (site, site_out))
    torch.testing.assert_close(lm.model.layers[0].mlp(x), y, rtol=1e-4, atol=1e-6)
    for level, reconstruction in zip(measurement.levels, sae.reconstruct_levels(x), strict=True):
        fve = 1 - (y - reconstruction).double().pow(2).sum() / (y.double() - y.double().mean(0)).pow(2).sum()
        assert level.fve == pytest.approx(fve.item(), abs=1e-6)

    def cross_entropy(batch, edit) -> tuple[float, int]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), replace(lm, {site_out: edit}):
            log_p = lm(**inputs).logits.log_softmax(-1)[:, :-1]
        counted = batch["keep"][:, :-1] & batch["keep"][:, 1:]
        of_next = log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return -of_next[counted].double().sum().item(), int(counted.sum())

    def spliced(batch, hidden):
        read = capture(lm, [site], **{name: batch[name] for name in ("input_ids", "attention_mask")})[site]
        return torch.where(batch["keep"][..., None], sae.reconstruct_levels(read)[-1], hidden)

    pairs = [cross_entropy(batch, lambda h, b=batch: spliced(b, h)) for batch in held_out.token_batches()]
    ours = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    measured = measure_cross_entropy(lm, site, sae, y.mean(0), held_out.token_batches(), output_site=site_out)
    assert measured.ce_clean + measured.levels[-1].ce_increase == pytest.approx(ours, rel=1e-6)
    assert measured.levels[-1].ce_increase != 0


def test_a_cache_of_both_sites_has_them_row_by_row_and_trains(tmp_path, lm, tokenizer, texts):
    sites = [resolve_site(lm, name) for name in MLP.values()]
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=32)
    stream = ActivationStream(lm, sites, windows, batch_size=64, block_tokens=300)
    cache = cache_activations(stream, tmp_path / "cache", max_tokens=2000)
    rows = next(CachedActivations(cache, batch_size=64, seed=3))
    torch.testing.assert_close(lm.model.layers[0].mlp(rows[sites[0]]), rows[sites[1]], rtol=1e-4, atol=1e-6)
    settings = {"max_steps": 4, "per_device_train_batch_size": 64, "eval_tokens": 200, "calibration_tokens": 200}
    arguments = SAETrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **settings)
    places = {"site": str(sites[0]), "site_out": str(sites[1])}
    trainer = SAETrainer(None, make_sae(**places), arguments, CachedActivations(cache, batch_size=1))
    (measurement,) = trainer.train().values()
    assert 0 < measurement.levels[-1].fve < 1
    assert MatryoshkaSAE.from_pretrained(tmp_path / "run").config.site_out == places["site_out"]
    wide = make_sae(**places, hidden_size_out=24)
    with pytest.raises(
        InputError, match=r"reconstructs activations of 24 dimensions, but the .* has 16 at model\.lay"
    ):
        SAETrainer(None, wide, arguments, CachedActivations(cache, batch_size=1))
    wide = make_sae(hidden_size=24, site=places["site"])
    with pytest.raises(InputError, match=r"reads activations of 24 dimensions, but the activation cache .* has 16 at"):
        SAETrainer(None, wide, arguments, CachedActivations(cache, batch_size=1))
    astray = make_sae(**{**places, "site_out": "model.layers.1.mlp:output"})
    with pytest.raises(InputError, match=r"has no site model\.layers\.1\.mlp:output"):
        SAETrainer(None, astray, arguments, CachedActivations(cache, batch_size=1))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"site": "layers.0.mlp", "site_out": "layers.0.mlp:input"}, "runs before .* a transcoder may not look back"),
        ({"site": "layers.1", "site_out": "layers.0"}, r"model\.layers\.0:output runs before model\.layers\.1:output"),
        ({"site": "layers.0", "site_out": "model.layers.0:output"}, "reads and writes model.layers.0:output"),
        ({**WIDER, "hidden_size_out": 16}, "of 16 dimensions, but those at .* have 24"),
        ({"site": "layers.0", "hidden_size_out": 16}, "does not record which activations it reconstructs"),
        ({"site": "layers.0", "site_out": "layers.9"}, "has 2 layers, so no 'layers.9'"),
        ({"site": "layers.0.mlp:input", "site_out": "transformer.h.0.mlp"}, r"has no site 'transformer\.h\.0\.mlp'"),
    ],
)
def test_places_that_do_not_go_together_are_refused_at_once(places, message, tmp_path, lm, tokenizer, texts):
    with pytest.raises(SiteError, match=message):
        make_trainer(lm, tokenizer, texts, tmp_path, make_sae(**places))


def test_an_encoders_and_a_decoders_tokens_are_no_pair(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    from hf_msae.sites import Site, check_order

    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    check_order(model, Site("encoder.block.0"), Site("encoder.block.1"))
    with pytest.raises(SiteError, match=r"\(2, 4\), and decoder\.block\.0:output for \(2, 5\)"):
        check_order(model, Site("encoder.block.0"), Site("decoder.block.0"))


def test_a_grid_pairs_sites(lm):
    read, written = ["layers.0.mlp:input", "layers.1"], ["layers.0.mlp.down_proj:input", "layers.1.mlp"]
    saes = make_saes(lm, read, [64], [4], sites_out=[written[0], "lm_head:input"], skip=True)
    assert [(sae.config.site_out, sae.config.output_size) for sae in saes] == [
        ("model.layers.0.mlp.down_proj:input", 24),
        ("lm_head:input", 16),
    ]
    with pytest.raises(InputError, match="Each site needs one site_out: there are 2 of the one"):
        make_saes(lm, read, [64], [4], sites_out=written[:1])


@pytest.mark.parametrize("skip", [False, True])
def test_a_run_may_begin_with_a_transcoder(skip, tmp_path):
    places = {"site": "model.layers.0.mlp:input", "site_out": "model.layers.0.mlp:output", "hidden_size_out": 24}
    initial = make_sae(**places, skip=skip)
    with torch.no_grad():
        initial.W_dec *= torch.rand(64, 1) + 0.5
        initial.b_dec.normal_()
        initial.threshold.fill_(0.5)
        if skip:
            initial.W_skip.normal_()
    initial.save_pretrained(tmp_path)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(5))
    wide = make_sae(**places, skip=skip, num_latents=96, prefix_sizes=[8, 64, 96])
    warm_start(wide, str(tmp_path), seed=0)
    torch.testing.assert_close(wide.W_dec.norm(dim=-1), torch.ones(96))
    expected = initial.eval().reconstruct_levels(x)
    torch.testing.assert_close(wide.eval().reconstruct_levels(x)[:2], expected, rtol=1e-4, atol=1e-5)
    for changes in ({"hidden_size_out": 20}, {"skip": not skip}, {"site_out": "model.layers.1.mlp:output"}):
        with pytest.raises(WarmStartError, match=f"{next(iter(changes))} is "):
            warm_start(make_sae(**{**places, "skip": skip, **changes}), str(tmp_path), seed=0)

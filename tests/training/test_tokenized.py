"""Training SAEs that add a vector of each activation's token: that tokens stay with their activations, all the way."""

import json

import pytest
import torch
from runs_of_processes import launch
from safetensors.torch import load_file
from small_runs import make_sae, make_trainer
from test_distributed import SETTINGS, SHAPE, assert_same_run
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE
from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import TOKEN_IDS, ActivationStream, CachedActivations, TokenWindows, as_documents, cache_activations
from hf_msae.data.lookups import check_lookup
from hf_msae.errors import InputError
from hf_msae.evaluation.completing import complete_on_text
from hf_msae.sites import resolve_site
from hf_msae.training.grid import make_saes
from hf_msae.training.learner import make_learners
from hf_msae.training.schedules import Length
from hf_msae.training.warm_start import WarmStartError, warm_start

FORMS = {
    "batch_topk": {},
    "jumprelu": {"activation": "jumprelu"},
    "log_loss": {"log_loss": True},
    "transcoder": {"site": "layers.0.mlp:input", "site_out": "layers.0.mlp.down_proj:input", "hidden_size_out": 24},
}


class Stop(TrainerCallback):
    """Ends the process's work after three quarters of the run, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ConnectionAbortedError("crash")


def tokenized(lm, **changes) -> MatryoshkaSAE:
    return make_sae(**{"lookup_size": lm.config.vocab_size} | changes)


@pytest.mark.parametrize("norm_limit", [0, 1.0])
def test_tokens_stay_with_their_activations(norm_limit, lm, tokenizer, texts):
    """At the embeddings, an activation is its token's row; outliers are left out of both."""
    embeddings = resolve_site(lm, "embeddings")
    rows = lm.get_input_embeddings().weight.detach()
    limit = rows.norm(dim=-1).median().item() if norm_limit else None
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=32)
    stream = ActivationStream(
        lm,
        [embeddings, TOKEN_IDS],
        windows,
        batch_size=64,
        block_tokens=300,
        seed=3,
        norm_limits={embeddings: limit},
    )
    seen = []
    for batch in stream:
        assert batch[TOKEN_IDS].shape == (64,)
        assert torch.equal(batch[embeddings], rows[batch[TOKEN_IDS]])
        seen.append(batch[TOKEN_IDS])
    assert len(torch.cat(seen).unique()) > 10
    assert (stream.num_filtered > 0) == bool(norm_limit)


@pytest.mark.parametrize("form", FORMS)
def test_a_crashed_run_resumes_to_the_same_bits(form, tmp_path, lm, tokenizer, texts):
    changes = {"gradient_accumulation_steps": 2} if form == "log_loss" else {}

    def run(name, **options):
        sae = tokenized(lm, **FORMS[form])
        return make_trainer(lm, tokenizer, texts, tmp_path / name, sae, **changes, **options)

    run("whole").train()
    with pytest.raises(ConnectionAbortedError):
        run("run", callbacks=[Stop()]).train()
    run("run").train(resume_from_checkpoint="last")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert "W_token" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text())["levels"] for name in ("run", "whole"))
    assert ours == theirs


def test_a_batch_in_parts_trains_as_the_whole(tmp_path, lm, tokenizer, texts):
    for parts in (1, 4):
        sizes = {"per_device_train_batch_size": 64 // parts, "gradient_accumulation_steps": parts}
        make_trainer(lm, tokenizer, texts, tmp_path / str(parts), tokenized(lm, log_loss=True), **sizes).train()
    whole, in_parts = (load_file(tmp_path / str(parts) / "model.safetensors") for parts in (1, 4))
    for name in whole:
        torch.testing.assert_close(in_parts[name], whole[name], rtol=1e-3, atol=1e-4)


def test_vectors_begin_at_what_tokens_add_to_the_mean(tmp_path, lm, tokenizer, texts):
    trainer = make_trainer(lm, tokenizer, texts, tmp_path, tokenized(lm))
    trainer.plan()
    (learner,) = make_learners(trainer.run, trainer.saes, trainer.sites, Length(8), trainer.output_sites)
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) + 4
    ids = torch.randint(20, (300,), generator=torch.Generator().manual_seed(2))
    learner.start(x, None, ids)
    vectors = learner.sae.W_token.detach()
    for token in range(20):
        of_token = x[ids == token] - x.mean(0)
        torch.testing.assert_close(vectors[token], of_token.sum(0) / (len(of_token) + 1), rtol=1e-4, atol=1e-4)
    assert not vectors[20:].any()


def test_measured_numbers_are_those_of_the_reconstruction_with_the_vectors(tmp_path, lm, tokenizer, texts):
    options = {"ce_tokens": 200, "norm_outlier_multiple": None}
    trainer = make_trainer(lm, tokenizer, texts, tmp_path, tokenized(lm), **options)
    (measurement,) = trainer.train().values()
    sae = MatryoshkaSAE.from_pretrained(tmp_path)
    assert sae.W_token.any()
    site = resolve_site(lm, sae.config.site)
    batches = list(trainer.evaluator.held_out.evaluation())
    x, ids = (torch.cat([batch[name] for batch in batches]) for name in (site, TOKEN_IDS))
    f = sae.encode(x)
    for level, m in zip(measurement.levels, sae.config.prefix_sizes, strict=True):
        reconstruction = f[:, :m] @ sae.W_dec[:m] + sae.b_dec + sae.W_token[ids]
        fve = 1 - (x - reconstruction).double().pow(2).sum() / (x.double() - x.double().mean(0)).pow(2).sum()
        assert level.fve == pytest.approx(fve.item(), abs=1e-6)
    batches = trainer.evaluator.held_out.token_batches()
    spliced = measure_cross_entropy(lm, site, sae, x.mean(0), batches)
    assert spliced.levels[-1].ce_increase == pytest.approx(_ce_increase(lm, trainer, sae), abs=1e-5)


@torch.no_grad()
def _ce_increase(lm, trainer, sae) -> float:
    """By a plain hook."""
    site, losses = resolve_site(lm, sae.config.site), {True: [], False: []}
    for batch in trainer.evaluator.held_out.token_batches():
        ids, keep = batch["input_ids"], batch["keep"]

        def edit(module, args, output, ids=ids, keep=keep):
            new = output.clone()
            x = output[keep]
            new[keep] = sae.encode(x) @ sae.W_dec + sae.b_dec + sae.W_token[ids[keep]]
            return new

        for spliced in losses:
            handle = lm.get_submodule(site.path).register_forward_hook(edit) if spliced else None
            logits = lm(input_ids=ids, attention_mask=batch["attention_mask"]).logits
            if handle is not None:
                handle.remove()
            counted = keep[:, :-1] & keep[:, 1:]
            wanted = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            losses[spliced].append(-wanted[counted])
    return (torch.cat(losses[True]).mean() - torch.cat(losses[False]).mean()).item()


def test_vectors_learn_what_only_the_token_tells(tmp_path, lm, tokenizer, texts):
    """At the embeddings all that there is to know is the token, and the table alone explains nearly everything."""
    saes = {"with": tokenized(lm, site="embeddings", k=1), "without": make_sae(site="embeddings", k=1)}
    measured = make_trainer(lm, tokenizer, texts, tmp_path, saes, max_steps=60, learning_rate=0.02).train()
    narrow = {name: one.levels[0].fve for name, one in measured.items()}
    assert narrow["with"] > 0.9 > narrow["without"] + 0.3


@pytest.mark.slow
def test_processes_that_share_tokens_or_latents_train_the_same_dictionary(tmp_path, lm, tokenizer, texts):
    """Two processes read other texts each, and have half of the tokens, or half of the latents and all tokens."""
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    saes = {form: SHAPE | FORMS[form] | {"lookup_size": lm.config.vocab_size} for form in FORMS}
    sizes = {"per_device_train_batch_size": 256, "context_length": 32, "block_tokens": 2048, "ce_tokens": 0}
    for name, shard_latents in (("tokens", False), ("latents", True)):
        args = SETTINGS | sizes | {"shard_latents": shard_latents, "output_dir": str(tmp_path / name)}
        launch(2, {"model": str(tmp_path / "lm"), "texts": texts, "saes": saes, "args": args})
    for form in FORMS:
        assert_same_run(tmp_path / "latents", tmp_path / "tokens", form)
        assert load_file(tmp_path / "latents" / form / "model.safetensors")["W_token"].any()


def test_a_run_may_begin_with_one_and_go_on_with_its_vectors(tmp_path, lm):
    initial = tokenized(lm)
    with torch.no_grad():
        initial.W_token.normal_()
    initial.save_pretrained(tmp_path)
    wide = tokenized(lm, num_latents=96, prefix_sizes=[8, 64, 96])
    warm_start(wide, str(tmp_path), seed=0)
    assert torch.equal(wide.W_token, initial.W_token)
    with pytest.raises(WarmStartError, match=f"lookup_size is {lm.config.vocab_size} there and None here"):
        warm_start(make_sae(), str(tmp_path), seed=0)


def test_the_run_records_whose_tokens_they_are(tmp_path, lm, tokenizer, texts):
    (sae,) = make_saes(lm, ["layers.0"], [64], [4], token_lookup=True)
    assert sae.config.lookup_size == lm.get_input_embeddings().num_embeddings
    make_trainer(lm, tokenizer, texts, tmp_path, sae).train()
    config = MatryoshkaSAE.from_pretrained(tmp_path).config
    assert config.lookup_tokenizer == (tokenizer.name_or_path or None)
    check_lookup(config, lm, tokenizer)
    assert len(config.lookup_vocabulary) == 64


def test_tokens_of_another_tokenizer_are_refused_before_any_work(tmp_path, lm, tokenizer, build_tokenizer, texts):
    other = build_tokenizer()
    other.add_tokens(["owl"])
    other.name_or_path = "somebody/else"
    sae = tokenized(lm, lookup_tokenizer="the/first")
    make_trainer(lm, tokenizer, texts, tmp_path / "run", sae).train()
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "run").eval()
    sae.config.lookup_tokenizer = "the/first"
    named = r"vector of each token of the/first, and these are tokens of somebody/else, which has another vocabulary"
    with pytest.raises(InputError, match=named):
        make_trainer(lm, other, texts, tmp_path / "again", sae)
    with pytest.raises(InputError, match=named):
        complete_on_text(sae, lm, other, texts, num_tokens=300)
    few = tokenized(lm, lookup_size=10)
    with pytest.raises(InputError, match=rf"knows 10 token ids, and .* has {lm.config.vocab_size}"):
        make_trainer(lm, tokenizer, texts, tmp_path / "few", few)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_cache_holds_no_tokens(tmp_path, lm, tokenizer, texts):
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=32)
    stream = ActivationStream(lm, ["layers.0"], windows, batch_size=64)
    cache_activations(stream, tmp_path / "cache", max_tokens=2_000)
    cache = CachedActivations(tmp_path / "cache", batch_size=64)
    with pytest.raises(InputError, match=r"an activation cache holds no tokens\. Train on the text itself"):
        make_trainer(lm, tokenizer, cache, tmp_path / "run", tokenized(lm))

"""End-to-end fine-tuning: its gradients by definition, exact resuming, and where it is refused.

The definition: the KL divergence of the language model with reconstructions in place from the model as it is, over the
tokens that were replaced, by autograd through dense products and a plain hook.
"""

import copy
import json

import pytest
import torch
from hf_msae.modeling.dense_ops import JumpReLU, select_batch_topk, select_topk
from hf_msae.modeling.selection import SINGLE_PROCESS, ProcessGroup
from runs_of_processes import launch
from safetensors.torch import load_file
from small_runs import SETTINGS, make_sae, make_trainer
from transformers import TrainerCallback

from hf_msae.cross_entropy import measure_cross_entropy
from hf_msae.data import ActivationStream, CachedActivations, TokenWindows, as_documents, cache_activations, collate
from hf_msae.errors import InputError
from hf_msae.training.end_to_end import divergence

pytestmark = pytest.mark.slow

# Half of the run, with batches of some windows, of which no token is an outlier.
BOTH = {"kl_from": 0.5, "per_device_train_batch_size": 128, "norm_outlier_multiple": 0}
MLP = {"site": "layers.0.mlp:input", "site_out": "layers.0.mlp.down_proj:input", "hidden_size_out": 24}
FORMS = {
    "batch_topk": {},
    "topk": {"activation": "topk"},
    "weighted": {"level_weights": [1.0, 3.0]},
    "jumprelu": {"activation": "jumprelu"},
    "relu": {"activation": "relu"},
    "dense relu": {"activation": "relu", "k": 32},
    "transcoder": {**MLP, "skip": True},
    "log_loss": {"log_loss": True},
    "tokenized": {"lookup_size": 80},
}


class Stop(TrainerCallback):
    """Ends the process's work after three quarters of the run, as a crash would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ConnectionAbortedError("crash")


def trained(lm, tokenizer, texts, folder, sae=None, **changes):
    """A trainer after a run whose second half counted predictions."""
    trainer = make_trainer(lm, tokenizer, texts, folder, sae, **{**BOTH, "lm_batch_size": 64} | changes)
    trainer.train()
    return trainer


def added(trainer, error=0.25, ranks=SINGLE_PROCESS):
    """What a step would add to gradients of zero, by name, and the mean divergence."""
    (learner,) = trainer.learners
    sae = learner.sae.train()
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    options = {"k": sae.config.k, "variance": learner.variance.float()}
    sites = (learner.site, learner.output_site)
    mean = trainer.end_to_end.add_gradients(sae, sites, options, torch.tensor(error), ranks)
    return {name: parameter.grad for name, parameter in sae.named_parameters()}, mean.item()


def latents_by_definition(sae, x, variance):
    pre = (x - sae.b_dec if sae.config.apply_b_dec_to_input else x) @ sae.W_enc.T + sae.b_enc
    match sae.config.activation:
        case "batch_topk":
            return select_batch_topk(pre, sae.config.k)
        case "topk":
            return select_topk(pre, round(sae.config.k))
        case "jumprelu":
            width = sae.config.jumprelu_bandwidth * (variance / sae.config.output_size).sqrt()
            return JumpReLU.apply(pre, sae.threshold, width)[0]
    return pre.relu()


def module_at(lm, name):
    return lm.get_submodule(name.partition(":")[0])


def by_definition(lm, trainer, widths):
    """The mean divergence, and its gradients by name; `widths` are the windows' latents."""
    (learner,) = trainer.learners
    sae, seen = learner.sae, {}
    batch = collate(trainer.loader.draw_windows(), trainer.loader.source.pad_id)
    inputs, keep = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["keep"]
    latents_of = torch.tensor(widths)[:, None].expand_as(keep)[keep]

    def replaced(hidden):
        x = seen.get("x", hidden)[keep]
        latents = latents_by_definition(sae, x, learner.variance.float())
        latents = latents * (torch.arange(latents.shape[1]) < latents_of[:, None])
        base = sae.b_dec if sae.W_skip is None else x @ sae.W_skip.T + sae.b_dec
        base = base if sae.W_token is None else base + sae.W_token[batch["input_ids"][keep]]
        new = hidden.detach().clone()
        new[keep] = latents @ sae.W_dec + base
        return new

    with torch.no_grad():
        clean = lm(**inputs).logits
    with torch.enable_grad():
        site, written = sae.config.site, sae.config.site_out or sae.config.site
        handles = []
        if sae.config.is_transcoder:
            note = lambda module, args: seen.update(x=args[0].detach())  # noqa: E731
            handles.append(module_at(lm, site).register_forward_pre_hook(note))
            edit = lambda module, args: (replaced(args[0]),)  # noqa: E731
            handles.append(module_at(lm, written).register_forward_pre_hook(edit))
        else:
            edit = lambda module, args, output: replaced(output)  # noqa: E731
            handles.append(module_at(lm, written).register_forward_hook(edit))
        logits = lm(**inputs).logits
        for handle in handles:
            handle.remove()
        log_p, log_q = (some[keep].log_softmax(-1) for some in (clean, logits))
        mean = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        names, parameters = zip(*sae.named_parameters(), strict=True)
        found = torch.autograd.grad(mean, parameters, allow_unused=True)
    return mean.item(), dict(zip(names, found, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dense_definition_as_large_as_the_error(form, tmp_path, lm, tokenizer, texts):
    trainer = trained(lm, tokenizer, texts, tmp_path, make_sae(**FORMS[form]), packing=False, kl_weight=0.5)
    gradients, mean = added(trainer)
    number = len(trainer.loader.draw_windows())
    share = 0.25 if form == "weighted" else 0.5  # of the windows that the first level, of 8 latents, is given
    widths = [8 if (place + 0.5) / number <= share else 64 for place in range(number)]
    wanted, by_autograd = by_definition(lm, trainer, widths)
    assert number > 4
    assert mean == pytest.approx(wanted, rel=1e-4)
    for name, gradient in gradients.items():
        expected = by_autograd[name] * 0.5 * 0.25 / wanted
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert expected.any(), name


def test_the_divergences_gradient_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    clean, logits = (torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    counted = torch.rand(3, 5, generator=generator) > 0.3
    total, gradient = divergence(clean, logits.requires_grad_(), counted)
    log_p, log_q = (some[counted].log_softmax(-1) for some in (clean, logits))
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(wanted, logits)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)


class OneOfTwo(ProcessGroup):
    """Of two processes one, to which the other's numbers are told."""

    def __init__(self, others=None):
        self.rank, self.size, self.others, self.own = 0, 2, others, None

    def sum(self, tensor):
        self.own = tensor.clone()
        return tensor if self.others is None else tensor + self.others


def test_two_processes_are_one_with_the_windows_of_both(tmp_path, lm, tokenizer, texts, monkeypatch):
    options = {"activation": "topk", "prefix_sizes": [64]}
    trainer = trained(lm, tokenizer, texts, tmp_path, make_sae(**options))
    windows = trainer.loader.draw_windows()
    whole, mean = added(trainer, error=0.5)
    halves = []
    for own, other in ((windows[:3], windows[3:]), (windows[3:], windows[:3])):
        seen = OneOfTwo()
        monkeypatch.setattr(trainer.loader, "draw_windows", lambda other=other: other)
        added(trainer, 0.25, seen)
        monkeypatch.setattr(trainer.loader, "draw_windows", lambda own=own: own)
        halves.append(added(trainer, 0.25, OneOfTwo(seen.own)))
    assert all(part[1] == pytest.approx(mean, rel=1e-5) for part in halves)
    for name, gradient in whole.items():
        both = halves[0][0][name] + halves[1][0][name]
        torch.testing.assert_close(both, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_two_launched_processes_are_one_process(tmp_path, lm, tokenizer):
    """Every step takes eight documents, each a window, whichever process reads them; the second half is fine-tuning.

    One level, because windows get their levels by the order in which a process draws them.
    """
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "lm")
    words = torch.randint(60, (160, 24), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [" ".join(f"w{word}" for word in line) for line in words]
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [64], "k": 4, "site": "model.layers.0:output"}
    # To where predictions depend on: a divergence at the edge of float32 would be the rounding's.
    across = {"site": "model.layers.0.mlp:input", "site_out": "model.layers.0:output", "hidden_size_out": 16}
    forms = {
        "topk": {"activation": "topk"},
        "relu": {"activation": "relu"},
        "aligned": {"activation": "topk", "aligned": True},
        "transcoder": {"activation": "topk", **across, "skip": True},
    }
    saes = {form: shape | options for form, options in forms.items()}
    common = {**SETTINGS, "kl_from": 0.5, "norm_outlier_multiple": 0, "packing": False, "shuffle": False}
    common |= {"logging_steps": 1, "save_steps": 0, "eval_tokens": 192, "calibration_tokens": 192}
    for processes in (1, 2):
        tokens = 192 // processes
        sizes = {"per_device_train_batch_size": tokens, "block_tokens": tokens, "lm_batch_size": 8 // processes}
        args = common | sizes | {"output_dir": str(tmp_path / str(processes))}
        plan = {"model": str(tmp_path / "lm"), "texts": texts[:96], "eval_texts": texts[96:], "saes": saes}
        launch(processes, plan | {"args": args})
    ours, theirs = (_log(tmp_path / str(processes)) for processes in (2, 1))
    assert len(ours) == len(theirs) == len(forms) * SETTINGS["max_steps"]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine["sae"], mine["step"], mine["tokens"]) == (other["sae"], other["step"], other["tokens"])
        assert ("kl" in mine) == ("kl" in other) == (mine["step"] > 4)
        for name in ("loss", "l0", "kl"):
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=1e-4), (mine["sae"], mine["step"], name)
    for form in forms:
        mine, its = (load_file(tmp_path / str(processes) / form / "model.safetensors") for processes in (2, 1))
        for name in its:
            apart = (mine[name] - its[name]).abs() > 1e-2 * its[name].abs().max().clamp_min(1e-9)
            assert apart.float().mean() < 0.05, (form, name)


@pytest.mark.parametrize("form", ["batch_topk", "relu", "transcoder"])
def test_a_crashed_run_resumes_to_the_same_bits(form, tmp_path, lm, tokenizer, texts):
    options = {"kl_from": 3, "lm_batch_size": 2}
    make_trainer(lm, tokenizer, texts, tmp_path / "whole", make_sae(**FORMS[form]), **options).train()
    crashing = make_trainer(
        lm, tokenizer, texts, tmp_path / "run", make_sae(**FORMS[form]), callbacks=[Stop()], **options
    )
    with pytest.raises(ConnectionAbortedError):
        crashing.train()
    resumed = make_trainer(lm, tokenizer, texts, tmp_path / "run", make_sae(**FORMS[form]), **options)
    resumed.train(resume_from_checkpoint="last")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (_log(tmp_path / name) for name in ("run", "whole"))
    assert ours == theirs
    assert ours[-1]["kl"] > 0


def _log(folder):
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_it_begins_where_it_is_told_and_leaves_the_language_model_alone(tmp_path, lm, tokenizer, texts):
    before = copy.deepcopy(lm.state_dict())
    for name, options in {"plain": {}, "fine": {"kl_from": 0.5}}.items():
        make_trainer(lm, tokenizer, texts, tmp_path / name, logging_steps=1, **options).train()
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in lm.parameters())
    for folder, same in (("checkpoint-4", True), (".", False)):
        plain, fine = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("plain", "fine"))
        assert torch.equal(plain["W_dec"], fine["W_dec"]) == same
    assert ["kl" in line for line in _log(tmp_path / "fine")] == [False] * 4 + [True] * 4
    assert not any("kl" in line for line in _log(tmp_path / "plain"))


def test_it_brings_predictions_nearer_to_the_models_own(tmp_path, lm, tokenizer, texts):
    measured = {}
    for name, more in {"plain": {}, "fine": {"kl_from": 0.25}}.items():
        trainer = make_trainer(
            lm, tokenizer, texts, tmp_path / name, max_steps=40, ce_tokens=400, save_steps=0, **more
        )
        trainer.train()
        (learner,), batches = trainer.learners, trainer.evaluator.held_out.token_batches()
        found = measure_cross_entropy(lm, learner.site, learner.sae, learner.sae.b_dec.detach(), batches)
        measured[name] = [level.kl for level in found.levels]
    assert all(fine < plain for fine, plain in zip(measured["fine"], measured["plain"], strict=True))


def test_a_step_more_than_the_block_has_takes_all_of_its_windows(lm, tokenizer, texts):
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=32)
    stream = ActivationStream(lm, ["layers.0"], windows, batch_size=64, block_tokens=300)
    with pytest.raises(RuntimeError, match="after a batch"):
        stream.draw_windows(64)
    next(stream)
    few, all_of_them = stream.draw_windows(64), stream.draw_windows(10**6)
    assert 64 <= sum(int(window.keep.sum()) for window in few) < 64 + 32
    assert 300 <= sum(int(window.keep.sum()) for window in all_of_them) < 300 + 32
    next(stream)
    assert [window.input_ids.tolist() for window in stream.draw_windows(64)] != [w.input_ids.tolist() for w in few]


def test_what_cannot_be_is_refused_in_words(tmp_path, lm, tokenizer, texts):
    windows = TokenWindows(as_documents(texts), tokenizer, context_length=32)
    stream = ActivationStream(lm, ["layers.0"], windows, batch_size=64, block_tokens=300)
    cache_activations(stream, tmp_path / "cache", max_tokens=2_000)
    cache = CachedActivations(tmp_path / "cache", batch_size=1)
    for model, dataset, changes, words in (
        (lm, cache, {}, "an activation cache holds no text"),
        (lm, texts, {"shard_latents": True}, "needs all of it"),
        (lm.model, texts, {}, "no head that predicts the next token"),
        (lm, texts, {"kl_weight": 0.0}, "kl_weight must be above 0"),
        (lm, texts, {"kl_from": -1}, "kl_from must not be negative"),
    ):
        with pytest.raises(InputError, match=words):
            make_trainer(model, tokenizer, dataset, tmp_path / "run", **{"kl_from": 0.5} | changes)
    make_trainer(lm, tokenizer, texts, tmp_path / "run").train()
    with pytest.raises(InputError, match=r"kl_from: None then, 0\.5 now"):
        make_trainer(lm, tokenizer, texts, tmp_path / "run", kl_from=0.5).train(resume_from_checkpoint="last")

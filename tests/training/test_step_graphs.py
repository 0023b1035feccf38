"""CUDA graphs of steps, on a pretended GPU: replayed steps are those that are computed as always."""

import copy
import json
import logging
import os
from dataclasses import replace

import pytest
import small_runs
import torch
from hf_msae.modeling import devices
from pretended_cuda import DEVICE, interpreted_kernels, pretended_cuda
from small_runs import make_trainer

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.training import SAETrainer, SAETrainingArguments, step_graphs
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run

pytestmark = pytest.mark.slow  # all operations pass through Python

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STEPS = 12
FORMS = {
    "batch_topk": {},
    "topk": {"activation": "topk"},
    "bfloat16": {"bf16": True},
    "log_loss": {"log_loss": True},
    "held back": {"inner_decoder_share": 0.0, "inner_activation_share": 0.25, "inner_share_start": 5},
    "detached": {"detach_prefixes": True},
    "aligned": {"aligned": True},
    "tokenized": {"lookup_size": 12},
    "transcoder": {"hidden_size_out": 10, "site": "layers.0", "site_out": "layers.1", "skip": True},
    "sorted": {"sort_latents_at": 9, "inner_share_start": 0, "dead_after_tokens": 10**9},
    "annealed": {"k_anneal_steps": 4, "k_initial": 6},
    "not clipped": {"max_grad_norm": 0},
}


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "runs_kernels", lambda device: False)


@pytest.fixture
def gpu():
    with pretended_cuda() as device:
        yield device


def make_learner(cuda_graphs: bool = True, tokens: int = 96, **changes) -> Learner:
    options = {"dead_after_tokens": 2 * tokens, "cuda_graphs": cuda_graphs, **changes}
    return small_runs.make_learner(DEVICE, tokens, STEPS, **options)


def train(learner: Learner, first: int = 0, last: int = STEPS) -> None:
    generator, tokens = torch.Generator().manual_seed(0), learner.args.per_device_train_batch_size
    for step in range(last):
        x = (3 + 5 * torch.randn(tokens, 16, generator=generator)).to(DEVICE)
        target = None if not learner.sae.config.is_transcoder else torch.tanh(x[:, :10])
        ids = None if not learner.sae.config.is_tokenized else (torch.arange(tokens).to(DEVICE) ** 2 + step) % 12
        if step == 0 == first:
            learner.start(x, target, ids)
        if step >= first:
            learner.step(x, step, target, ids)


def state(learner: Learner) -> dict[str, torch.Tensor]:
    found = dict(learner.sae.state_dict()) | learner.latent_state()
    found |= {"bad step": learner.bad_step, "sums": learner.log.sums, "levels": learner.log.levels}
    return {name: tensor.cpu() for name, tensor in found.items()}


def assert_same(one: Learner, other: Learner) -> None:
    expected = state(other)
    for name, tensor in state(one).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_replayed_steps_are_those_that_are_computed(gpu, form: str) -> None:
    replayed, computed = make_learner(**FORMS[form]), make_learner(**FORMS[form])
    computed.graphs.captures = False
    for learner in (replayed, computed):
        train(learner)
    assert replayed.graphs.replays >= 7
    # Of an aligned SAE, none is dead in so few steps.
    assert (replayed.log.means(levels=False)["aux_loss"] > 0) == (form not in ("aligned", "sorted"))
    assert_same(replayed, computed)


@pytest.mark.parametrize("form", ["batch_topk", "topk", "held back", "aligned"])
def test_they_are_nearly_the_steps_without_graphs(gpu, form: str) -> None:
    """Which have learning rates of the CPU, and dead latents in no more than their number."""
    replayed, plain = make_learner(**FORMS[form]), make_learner(cuda_graphs=False, **FORMS[form])
    for learner in (replayed, plain):
        train(learner)
    assert plain.graphs is None
    found, expected = replayed.read_log(), plain.read_log()
    assert found.pop("level_losses") == pytest.approx(expected.pop("level_losses"), rel=1e-3)
    assert found == pytest.approx(expected, rel=1e-3)
    for mine, its in zip(replayed.sae.parameters(), plain.sae.parameters(), strict=True):
        assert ((mine - its).abs() > 1e-3 * its.abs().max()).float().mean() < 0.02


@pytest.mark.parametrize("num_dead", [0, 20])
def test_a_replayed_step_waits_twice_and_asks_for_little(gpu, num_dead: int) -> None:
    """For candidates and for dead latents; the rest is only copied to where the graph reads it."""
    learner, plain = make_learner(), make_learner(cuda_graphs=False)
    asked = {}
    for one in (plain, learner):
        one.dead_after = 10**9
        train(one, last=1)
        for step in range(1, 7):
            one.silent_tokens[:num_dead] = 2 * 10**9
            x = torch.randn(96, 16).to(DEVICE)
            gpu.clear()
            one.step(x, step)
        asked[one] = sum(gpu.operations.values())
        assert len(gpu.syncs) == 2, [str(event) for event in gpu.syncs]
    assert learner.graphs.replays > 3
    assert asked[learner] < asked[plain] / 2, asked.values()


def test_a_run_goes_on_with_tensors_of_its_own(gpu) -> None:
    """What a checkpoint brings lies elsewhere than what the graphs of the steps before it write."""
    whole, resumed = make_learner(), make_learner()
    train(whole)
    train(resumed, last=7)
    saved, rows = copy.deepcopy((resumed.state_dict(), resumed.latent_state()))
    weights = copy.deepcopy(resumed.sae.state_dict())
    train(resumed, first=7, last=9)
    resumed.sae.load_state_dict(weights)
    resumed.load_state_dict(saved, rows)
    train(resumed, first=7)
    assert_same(resumed, whole)


def test_steps_that_cannot_be_captured_are_computed(gpu, caplog) -> None:
    """As where an operation reads a number in between; one warning, and no gradient stays behind."""
    failing, plain = make_learner(), make_learner()
    plain.graphs.captures = False
    backward = torch.Tensor.backward

    def reads(loss: torch.Tensor) -> None:
        backward(loss)
        loss.item()

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch.Tensor, "backward", reads)
        train(failing)
    train(plain)
    assert [record.message for record in caplog.records if "captured" in record.message] == [
        "A step could not be captured in a CUDA graph, so steps are computed as without --cuda-graphs. (operation not "
        "permitted when stream is capturing: _local_scalar_dense at test_step_graphs.py:"
        f"{reads.__code__.co_firstlineno + 2} in reads)"
    ]
    assert failing.graphs.replays == 0
    assert_same(failing, plain)


def test_there_are_not_too_many_graphs(gpu, monkeypatch) -> None:
    monkeypatch.setattr(step_graphs, "MAX_GRAPHS", 1)
    few, many = make_learner(), make_learner()
    for learner in (few, many):
        train(learner)
    assert len(few.graphs._graphs) == 1
    assert_same(few, many)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter (see tests/modeling/test_triton_ops.py)")
@pytest.mark.parametrize("bf16", [False, True])
def test_kernels_are_replayed(gpu, monkeypatch, bf16: bool) -> None:
    from hf_msae.modeling import triton_ops, triton_rows

    monkeypatch.setattr(devices, "runs_kernels", lambda device: True)
    with interpreted_kernels(triton_ops, gpu), interpreted_kernels(triton_rows, gpu):
        replayed, computed = (make_learner(tokens=12, bf16=bf16) for _ in range(2))
        computed.graphs.captures = False
        for learner in (replayed, computed):
            train(learner, last=7)
    assert replayed.graphs.replays >= 3
    assert_same(replayed, computed)


REFUSED = {
    "trains on cpu": ({}, {}),
    "micro-batches": ({"gradient_accumulation_steps": 2}, {}),
    "relu": ({}, {"activation": "relu"}),
    "jumprelu": ({}, {"activation": "jumprelu"}),
    "pareto": ({}, {"prefix_sampling": "pareto"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_captured_is_refused_at_once(reason: str) -> None:
    of_run, of_sae = REFUSED[reason]
    run = Run(SAETrainingArguments(use_cpu=True, cuda_graphs=True, **of_run))
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[8, 64], k=4, **of_sae))
    if reason != "trains on cpu":
        run.device = DEVICE
    with pytest.raises(InputError, match=rf"(?s)cuda_graphs cannot be had here.*{reason}.*leave cuda_graphs out"):
        step_graphs.check_graphs(run, {"an SAE": sae})


def test_a_trainer_refuses_it_before_anything_else(trainer) -> None:
    with pytest.raises(InputError, match="this run trains on cpu"):
        trainer(cuda_graphs=True)


def test_a_run_of_the_trainer_is_replayed(gpu, lm, tokenizer, texts, tmp_path, monkeypatch) -> None:
    """With the language model's passes, dead latents that come and go, and a log of numbers."""
    monkeypatch.setattr(SAETrainer, "_finish", lambda self: {})  # safetensors asks for memory, which only CPUs have
    logs = []
    for cuda_graphs in (True, False):
        folder, model = tmp_path / str(cuda_graphs), copy.deepcopy(lm)
        run = make_trainer(model, tokenizer, texts, folder, max_steps=STEPS, save_steps=0, logging_steps=1)
        run.run.device = run.loader.device = DEVICE
        run.run.args = replace(run.run.args, cuda_graphs=cuda_graphs)
        model.to(DEVICE)
        run.train()
        logs.append([json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()])
        if cuda_graphs:
            assert run.learners[0].graphs.replays > 3
    replayed, plain = ([line for line in log if "loss" in line] for log in logs)
    assert len(replayed) == len(plain) == STEPS
    for mine, its in zip(replayed, plain, strict=True):
        assert mine["learning_rate"] == its["learning_rate"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-3)

"""In which precision products run: what the device has, unless it is asked for or refused; and that it is said."""

import json

import pytest
import torch
from pretended_cuda import DEVICE, pretended_cuda
from training.small_runs import make_trainer

from hf_msae.training import SAETrainingArguments
from hf_msae.training.precision import describe_precision, products, with_precision
from hf_msae.training.run import Run

AMPERE, TURING = (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "asked", "expected", "words"),
    [
        (AMPERE, {}, (True, False), "bfloat16"),
        (AMPERE, {"bf16": False}, (False, True), "TF32"),
        (AMPERE, {"bf16": False, "tf32": False}, (False, False), "float32"),
        (AMPERE, {"bf16": True, "tf32": True}, (True, True), "bfloat16"),
        (TURING, {}, (False, False), "float32"),
        (TURING, {"bf16": True}, (True, False), "bfloat16"),
        (None, {}, (False, False), "float32"),
        (None, {"bf16": True}, (True, False), "bfloat16"),
    ],
)
def test_what_is_left_open_is_what_the_device_has(capability, asked, expected, words) -> None:
    args = SAETrainingArguments(**asked)
    if capability is None:
        found = with_precision(args, torch.device("cpu"))
    else:
        with pretended_cuda(capability):
            found = with_precision(args, DEVICE)
    assert (found.bf16, found.tf32) == expected
    assert describe_precision(found).startswith(words)


def test_a_resumed_run_keeps_its_precision_unless_another_is_asked_for() -> None:
    with pretended_cuda(AMPERE):
        then = {"bf16": False, "tf32": False, "seed": 3}
        found = with_precision(SAETrainingArguments(), DEVICE, then)
        assert (found.bf16, found.tf32, found.seed) == (False, False, 0)
        assert with_precision(SAETrainingArguments(bf16=True), DEVICE, then).bf16
        # One that an older version wrote says nothing of TF32, which it did not have.
        assert not with_precision(SAETrainingArguments(), DEVICE, {"bf16": True}).tf32


def test_tf32_holds_within_a_step_alone() -> None:
    args = SAETrainingArguments(tf32=True)
    before = torch.get_float32_matmul_precision()
    with products(args, DEVICE):
        assert torch.get_float32_matmul_precision() == "high"
    with products(args, torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    with products(SAETrainingArguments(tf32=False), DEVICE):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_the_run_decides_and_records(lm, tokenizer, texts, tmp_path) -> None:
    trainer = make_trainer(lm, tokenizer, texts, tmp_path / "run", max_steps=2)
    trainer.train()
    recorded = json.loads((tmp_path / "run" / "training_arguments.json").read_text())
    assert (recorded["bf16"], recorded["tf32"]) == (False, False)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["precision"] == "float32"
    run = Run(SAETrainingArguments(use_cpu=True))
    run.keep_precision({"bf16": True})
    assert run.args.bf16


def test_a_step_of_a_gpu_runs_in_what_was_chosen() -> None:
    from small_runs import make_learner
    from training.test_on_a_gpu import batches

    seen = []
    with pretended_cuda(AMPERE):
        for asked in ({}, {"bf16": False}):
            learner = make_learner(DEVICE, **asked)
            learner.args = with_precision(SAETrainingArguments(**asked), DEVICE)
            x = batches(1)[0].to(DEVICE)
            learner.start(x)
            look = learner.sae.register_forward_pre_hook(
                lambda *_: seen.append((torch.is_autocast_enabled("cuda"), torch.get_float32_matmul_precision()))
            )
            learner.step(x, 0)
            look.remove()
            assert {parameter.dtype for parameter in learner.sae.parameters()} == {torch.float32}
    assert seen == [(True, "highest"), (False, "high")]

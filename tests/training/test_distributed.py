"""R processes are one process, and so are micro-batches: the same tokens give the same losses and weights.

Every run here is a run of real processes that talk over gloo, 16 steps on an activation cache, which deals each
process its slice of the same batch. Weights are compared after Adam, whose steps have a fixed size, so that a gradient
that is off by any factor shows.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from runs_of_processes import launch
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import (
    ActivationStream,
    CachedActivations,
    Documents,
    TokenWindows,
    as_documents,
    cache_activations,
)
from hf_msae.training import SAETrainer, SAETrainingArguments

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 16, "num_latents": 96, "prefix_sizes": [8, 24, 96], "k": 4, "site": "model.layers.0:output"}
# What an MLP's last projection reads, from what the MLP reads.
MLP = {
    "site": "model.layers.0.mlp:input",
    "site_out": "model.layers.0.mlp.down_proj:input",
    "hidden_size_out": 24,
}
FORMS = {
    "batch_topk": {},
    "topk": {"activation": "topk"},
    "jumprelu": {"activation": "jumprelu", "sparsity_weight": 0.5},
    "relu": {"activation": "relu"},
    "p_annealed": {"activation": "relu", "p_end": 0.3},
    "aligned": {"aligned": True},
    "log_loss": {"log_loss": True},
    "pareto": {"prefix_sampling": "pareto", "num_sampled_prefixes": 3},
    "held_back": {"inner_decoder_share": 0.0, "inner_activation_share": 0.25},
    "transcoder": {**MLP, "skip": True},
    "jumprelu_transcoder": {**MLP, "activation": "jumprelu", "log_loss": True, "sparsity_weight": 0.5},
    "dead": {"num_latents": 256, "prefix_sizes": [16, 256], "k": 2, "num_aux_latents": 5},
}
# Processes, tokens of each in a micro-batch, and micro-batches: always 512 tokens a step.
WHOLE = "1x512"
LAYOUTS = {WHOLE: (1, 512, 1), "1x256x2": (1, 256, 2), "2x256": (2, 256, 1), "4x128": (4, 128, 1)}
LAYOUTS |= {"2x64x4": (2, 64, 4)}
STEPS = 16
SETTINGS = {
    "max_steps": STEPS,
    "eval_tokens": 1000,
    "calibration_tokens": 1000,
    "logging_steps": STEPS // 4,
    "save_steps": 0,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_cache(folder: Path, lm, tokenizer, sites=("layers.0", MLP["site"], MLP["site_out"])) -> Path:
    """9,216 activations of the random LM: 14 batches, so that a run begins again, and what is held out."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(60, (500, 32), generator=generator).tolist()
    documents: Documents = as_documents([" ".join(f"w{word}" for word in document) for document in words])
    windows = TokenWindows(documents, tokenizer, context_length=32)
    stream = ActivationStream(lm, list(sites), windows, batch_size=512, block_tokens=4096)
    return cache_activations(stream, folder, max_tokens=9_216, shard_tokens=4096)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lm, tokenizer) -> Path:
    """The folder in which every form was trained in every layout, `layout/form`."""
    folder = tmp_path_factory.mktemp("distributed")
    cache = make_cache(folder / "cache", lm, tokenizer)
    saes = {form: SHAPE | options for form, options in FORMS.items()}
    for layout, (processes, batch, accumulation) in LAYOUTS.items():
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = SETTINGS | sizes | {"output_dir": str(folder / layout)}
        if processes == 1:
            models = {form: MatryoshkaSAE(MatryoshkaSAEConfig(**options)) for form, options in saes.items()}
            SAETrainer(None, models, SAETrainingArguments(**args), CachedActivations(cache, batch_size=1)).train()
        else:
            launch(processes, {"cache": str(cache), "saes": saes, "args": args})
    return folder


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def log_of(folder: Path, form: str) -> list[dict]:
    return [line for line in log_lines(folder) if line["sae"] == form]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != WHOLE])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_weights_are_those_of_one_process(finished, form, layout):
    assert_same_run(finished / layout, finished / WHOLE, form)


def assert_same_run(one: Path, other: Path, form: str) -> None:
    """To float tolerance. A value on the border of the selection, or a latent about to be dead, may fall to either
    side by the last bit of a sum, and then a few latents go their own way; hence shares rather than maxima at the end.
    """
    ours, theirs = log_of(one, form), log_of(other, form)
    assert [line["step"] for line in ours] == [STEPS // 4 * quarter for quarter in (1, 2, 3, 4)]
    for mine, other_line in zip(ours, theirs, strict=True):
        tolerance = 1e-5 if mine["step"] <= STEPS // 2 else 5e-3
        assert mine["tokens"] == other_line["tokens"] == 512 * mine["step"]
        for name in ("loss", "l0", "level_losses"):
            if name in mine:
                assert mine[name] == pytest.approx(other_line[name], rel=tolerance), (name, mine["step"])
        assert mine["dead"] == pytest.approx(other_line["dead"], abs=0.03)
    mine, its = (load_file(folder / form / "model.safetensors") for folder in (one, other))
    assert mine.keys() == its.keys()
    for name in mine:
        assert mine[name].shape == its[name].shape
        scale = its[name].abs().max().clamp_min(1e-9)
        apart = ((mine[name] - its[name]).abs() / scale > 1e-2).float().mean()
        assert apart < 0.05, (name, apart)
    measured = [json.loads((folder / form / "metrics.json").read_text())["levels"] for folder in (one, other)]
    for level, other_level in zip(*measured, strict=True):
        assert level["fve"] == pytest.approx(other_level["fve"], abs=2e-3)
        assert level["l0"] == pytest.approx(other_level["l0"], rel=2e-2)


def test_a_shard_of_documents_that_ends_early_begins_again(tmp_path, lm, tokenizer):
    """Every second document, all those of process 1, has three words instead of forty; both take the same 30 steps."""
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    words = torch.randint(60, (240, 40), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [" ".join(f"w{word}" for word in line[: 3 if i % 2 else 40]) for i, line in enumerate(words)]
    args = SETTINGS | {"output_dir": str(tmp_path / "run"), "max_steps": 30, "per_device_train_batch_size": 64}
    args |= {"eval_tokens": 200, "calibration_tokens": 200, "block_tokens": 300, "context_length": 32, "ce_tokens": 50}
    args |= {"shuffle": False, "logging_steps": 6}  # so that process 1 has the short ones
    plan = {"model": str(tmp_path / "lm"), "texts": texts, "saes": {"sae": SHAPE}, "args": args}
    passes = dict(re.findall(r"process (\d): (\d+) passes ended", launch(2, plan)))
    assert int(passes["1"]) >= 3 * max(1, int(passes["0"]))
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [6, 12, 18, 24, 30]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 30

"""Whether memory stays flat over a long run: resident memory of a real training, sampled all along.

    python benchmarks/soak.py --minutes 10 --json soak.json

A small model on a text that is read many times over, with everything that a long run does: blocks are harvested,
checkpoints written and rotated, held-out tokens measured, lines logged. After a warm-up (memory rises until every
buffer exists once) a straight line is laid through the samples. Neighbouring samples are not independent, so the
spread of its slope comes from drawing stretches of a tenth of the residuals with replacement (a block bootstrap). What
matters is the slope an hour, and whether zero is within the spread.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from train_step import resident
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.worlds.stories import StoryWorld, load_story_lm

MB = 1e6
BLOCKS = 10


class Sampler(TrainerCallback):
    """Notes time, step and resident memory, and ends the run when the time is up."""

    def __init__(self, minutes: float, every: int) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.every = every
        # Flat, so that what measures grows by little itself.
        self._numbers = array("d")

    @property
    def samples(self) -> list[tuple[float, int, int]]:
        """Moment in seconds, step, and resident bytes."""
        triples = zip(*(self._numbers[part::3] for part in range(3)), strict=True)
        return [(moment, int(step), int(memory)) for moment, step, memory in triples]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._numbers.extend((time.monotonic(), state.global_step, resident("VmRSS")))
        control.should_training_stop = time.monotonic() > self.end
        return control


def slope(samples: Sequence[tuple[float, int, int]]) -> float:
    """Bytes an hour, by least squares."""
    hours = [moment / 3600 for moment, _, _ in samples]
    return statistics.linear_regression(hours, [memory for _, _, memory in samples]).slope


def spread(samples: Sequence[tuple[float, int, int]], rounds: int = 2000) -> tuple[float, float]:
    """The 2.5% and 97.5% points of the slope, what is left of the line drawn anew from stretches of itself."""
    hours = [moment / 3600 for moment, _, _ in samples]
    line = statistics.linear_regression(hours, [memory for _, _, memory in samples])
    fitted = [line.intercept + line.slope * hour for hour in hours]
    left = [memory - value for (_, _, memory), value in zip(samples, fitted, strict=True)]
    size, draw = len(samples) // BLOCKS, random.Random(0)
    slopes = []
    for _ in range(rounds):
        drawn: list[float] = []
        while len(drawn) < len(left):
            begin = draw.randrange(len(left) - size + 1)
            drawn += left[begin : begin + size]
        values = [value + noise for value, noise in zip(fitted, drawn, strict=False)]
        slopes.append(statistics.linear_regression(hours, values).slope)
    slopes.sort()
    return slopes[rounds // 40], slopes[-rounds // 40]


def train(minutes: float, output: Path, every: int) -> tuple[Sampler, int]:
    """The run; gives the samples and the steps taken."""
    _, tokenizer = load_story_lm()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=32, num_latents=512, k=8, site="layers.0"))
    args = SAETrainingArguments(
        output_dir=str(output),
        max_steps=10**7,
        per_device_train_batch_size=256,
        block_tokens=16_384,
        eval_tokens=4000,
        calibration_tokens=4000,
        ce_tokens=2000,
        context_length=64,
        eval_steps=1000,
        save_steps=500,
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=True,
    )
    sampler = Sampler(minutes, every)
    documents = StoryWorld(seed=0).documents(2000)
    model = LlamaForCausalLM(config).eval()
    trainer = SAETrainer(model, sae, args, documents, processing_class=tokenizer, callbacks=[sampler])
    trainer.train()
    return sampler, trainer.state.global_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=int, default=25, help="steps between samples")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the samples left out at the beginning")
    parser.add_argument("--json", help="write the numbers and all samples, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hf-msae-soak-") as folder:
        sampler, steps = train(options.minutes, Path(folder) / "run", options.every)
    samples = sampler.samples
    kept = samples[int(options.warm_up * len(samples)) :]
    if len(kept) < 2 * BLOCKS:
        raise SystemExit(f"{len(kept)} samples after the warm-up tell nothing; give more --minutes.")
    low, high = spread(kept)
    result = {
        "steps": steps,
        "minutes": options.minutes,
        "samples": len(kept),
        "resident_mb": {"first": kept[0][2] / MB, "last": kept[-1][2] / MB, "most": max(m for *_, m in kept) / MB},
        "mb_an_hour": {"slope": slope(kept) / MB, "low": low / MB, "high": high / MB},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result | {"all": samples}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

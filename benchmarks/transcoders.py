"""Transcoders of the story model's MLP: ours, nested and not, beside sparsify's by its own trainer.

    .venv-peers/bin/python benchmarks/transcoders.py --max-tokens 1000000 --json transcoders.json

All see the same stories, and are measured on the same held-out ones: how much of the MLP's output each level explains,
and how much of the cross-entropy survives where the MLP is replaced by it. sparsify trains with its defaults (Signum
with its schedule-free average) and with Adam. SAELens reads transcoders but has no trainer for them. The last column
is of the whole run, the language model included; it was alone on the machine or it means little.
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from datasets import Dataset
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

from hf_msae import MatryoshkaSAE, SAETrainer, SAETrainingArguments
from hf_msae.data import TokenWindows
from hf_msae.evaluation import collect
from hf_msae.evaluation.core import measure_core
from hf_msae.metrics import Measurement
from hf_msae.sites import resolve_site
from hf_msae.training import make_saes
from hf_msae.worlds.stories import StoryWorld, load_story_lm

SITE, SITE_OUT = "layers.2.mlp:input", "layers.2.mlp"
CONTEXT = 128
# Ours holds these out by their hash; the peer reads none of the held-out stories either, which are of another seed.
TRAIN_SEED, HELD_OUT_SEED = 0, 1_001


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--prefix-sizes", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--max-tokens", type=int, default=1_000_000)
    parser.add_argument("--held-out-tokens", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


class Contest:
    """The story model and what everyone gets of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: Any
        self.model, self.tokenizer = load_story_lm()

    def stories(self, seed: int) -> Any:
        # About 100 tokens a story.
        return StoryWorld(seed=seed).documents(max(2_000, self.options.max_tokens // 50))

    def ours(self, seed: int, folder: Path, **options: Any) -> MatryoshkaSAE:
        saes = make_saes(
            self.model,
            [SITE],
            num_latents=[self.options.num_latents],
            k=[self.options.k],
            sites_out=[SITE_OUT],
            **{"prefix_sizes": self.options.prefix_sizes, **options},
        )
        arguments = SAETrainingArguments(
            output_dir=str(folder),
            max_tokens=self.options.max_tokens,
            per_device_train_batch_size=2048,
            context_length=CONTEXT,
            eval_tokens=10_000,
            calibration_tokens=10_000,
            ce_tokens=0,
            block_tokens=min(SAETrainingArguments.block_tokens, self.options.max_tokens),
            seed=seed,
            report_to="none",
        )
        SAETrainer(self.model, saes, arguments, self.stories(TRAIN_SEED), processing_class=self.tokenizer).train()
        return MatryoshkaSAE.from_pretrained(folder)

    def sparsify(self, seed: int, folder: Path, **options: Any) -> MatryoshkaSAE:
        windows = TokenWindows(self.stories(TRAIN_SEED), self.tokenizer, context_length=CONTEXT)
        full = (window.input_ids.tolist() for window in windows if len(window.input_ids) == CONTEXT)
        rows = list(islice(full, self.options.max_tokens // CONTEXT))
        torch.manual_seed(seed)
        trainer = Trainer(
            TrainConfig(
                SparseCoderConfig(num_latents=self.options.num_latents, k=self.options.k, transcode=True),
                batch_size=2048 // CONTEXT,
                hookpoints=[SITE_OUT],
                init_seeds=[seed],
                exclude_tokens=list(self.tokenizer.all_special_ids),
                log_to_wandb=False,
                save_dir=str(folder),
                save_every=10**9,
                **options,
            ),
            Dataset.from_dict({"input_ids": rows}).with_format("torch"),
            self.model,
        )
        trainer.fit()
        (coder,) = trainer.saes.values()
        assert isinstance(coder, SparseCoder)
        coder.save_to_disk(folder / "coder")
        sae = MatryoshkaSAE.from_sparsify(folder / "coder")
        sae.config.update({"site": SITE, "site_out": SITE_OUT})
        return sae

    def measure(self, saes: dict[str, MatryoshkaSAE]) -> dict[str, Measurement]:
        site, site_out = resolve_site(self.model, SITE), resolve_site(self.model, SITE_OUT)
        text = collect(
            self.model,
            self.tokenizer,
            site,
            self.stories(HELD_OUT_SEED),
            num_tokens=self.options.held_out_tokens,
            context_length=CONTEXT,
            site_out=site_out,
            norm_limit=0,
            norm_limit_out=0,
        )
        found = measure_core(text, saes, ce_tokens=self.options.held_out_tokens // 5, rate_tokens=1_000)
        return {name: result.measurement for name, result in found.items()}


def train_all(contest: Contest, seed: int, folder: Path) -> tuple[dict[str, MatryoshkaSAE], dict[str, float]]:
    """Everyone's transcoder of this seed, and the seconds that each took."""
    plain: dict[str, Any] = {"prefix_sizes": [contest.options.num_latents]}
    runs = {
        "ours, nested": lambda to: contest.ours(seed, to),
        "ours, BatchTopK": lambda to: contest.ours(seed, to, **plain),
        "ours, TopK": lambda to: contest.ours(seed, to, activation="topk", **plain),
        "sparsify": lambda to: contest.sparsify(seed, to),
        # Its warm-up of 1,000 steps is longer than a short run.
        "sparsify, Adam": lambda to: contest.sparsify(
            seed, to, optimizer="adam", lr_warmup_steps=min(1_000, contest.options.max_tokens // 2048 // 20)
        ),
    }
    saes, seconds = {}, {}
    for name, run in runs.items():
        began = time.perf_counter()
        saes[name] = run(folder / f"{name}-{seed}").eval().requires_grad_(False)
        seconds[name] = time.perf_counter() - began
        print(f"{name}, seed {seed}: {seconds[name]:.0f} s", flush=True)
    return saes, seconds


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    contest = Contest(options)
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            saes, seconds = train_all(contest, seed, Path(folder))
            for name, measurement in contest.measure(saes).items():
                for level in measurement.levels:
                    row = rows.setdefault(
                        (name, level.prefix), {"L0": [], "FVE": [], "CE recovered": [], "seconds": []}
                    )
                    assert level.ce_recovered is not None
                    values = (level.l0, level.fve, level.ce_recovered, seconds[name])
                    for column, value in zip(row.values(), values, strict=True):
                        column.append(value)
    print("\n| transcoder | latents | L0 | FVE of the output | CE recovered | seconds |\n|---|---|---|---|---|---|")
    for (name, prefix), row in rows.items():
        fve, recovered = (f"{fmean(row[of]):.3f} ± {pstdev(row[of]):.3f}" for of in ("FVE", "CE recovered"))
        print(f"| {name} | {prefix:,} | {fmean(row['L0']):.1f} | {fve} | {recovered} | {fmean(row['seconds']):.0f} |")
    if options.json:
        found = [{"transcoder": name, "latents": prefix, **row} for (name, prefix), row in rows.items()]
        Path(options.json).write_text(
            json.dumps({"setting": vars(options), "rows": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()

"""What a whole training run costs beside its parts: the language model's passes alone and the SAE's steps alone.

    python benchmarks/end_to_end.py --model ../shared/data/stories260K --dataset ../shared/data/tinystories.txt \\
        --site layers.2 --num-latents 1024 --k 8

All three run in one process on the same windows, in turn, several times; medians are reported. `overhead` is the run's
time over the sum of the two others: what shuffling, logging and checkpoints add, less what overlaps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import TokenWindows, as_documents, harvest, load_documents
from hf_msae.data.holding_out import BASE_SPLIT
from hf_msae.sites import resolve_site, site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run
from hf_msae.worlds.stories import StoryWorld, story_lm_path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(story_lm_path()))
    parser.add_argument("--dataset", help="text; default: stories")
    parser.add_argument("--site", default="layers.2")
    parser.add_argument("--num-latents", type=int, default=2048)
    parser.add_argument("--k", type=float, default=16)
    parser.add_argument("--grid", type=int, default=4, help="how many SAEs the grid trains from one pass")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lm-batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", help="write the numbers here, too")
    return parser.parse_args()


class Parts:
    """The run and its two halves, over the same tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = Accelerator(cpu=not torch.accelerator.is_available()).device
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        self.model = model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.documents = (
            load_documents(options.dataset) if options.dataset else as_documents(StoryWorld().documents(50_000))
        )
        self.site = resolve_site(self.model, options.site)
        self.width = site_width(self.model, self.site)
        self.context_length = min(512, self.model.config.max_position_embeddings)
        self.tokens = options.steps * options.batch_size
        self.windows = self._windows()
        self.activations = torch.cat([x[self.site].float() for x in self._harvest()])[: self.tokens]

    def _windows(self) -> list:
        windows, tokens = [], 0
        training = self.documents.without(BASE_SPLIT)
        for window in TokenWindows(training, self.tokenizer, context_length=self.context_length):
            windows.append(window)
            tokens += int(window.keep.sum())
            if tokens >= self.tokens:
                return windows
        raise SystemExit(f"The dataset has only {tokens:,} tokens; take fewer --steps.")

    def _harvest(self):
        return harvest(self.model, [self.site], self.windows, lm_batch_size=self.options.lm_batch_size)

    def sae(self, k: float | None = None) -> MatryoshkaSAE:
        options = self.options
        config = MatryoshkaSAEConfig(
            hidden_size=self.width, num_latents=options.num_latents, k=k or options.k, site=str(self.site)
        )
        return MatryoshkaSAE(config)

    def arguments(self, folder: str) -> SAETrainingArguments:
        return SAETrainingArguments(
            output_dir=folder,
            max_steps=self.options.steps,
            per_device_train_batch_size=self.options.batch_size,
            lm_batch_size=self.options.lm_batch_size,
            # One block: the run harvests the same tokens as the language model alone does.
            block_tokens=self.tokens,
            bf16=self.options.bf16,
            save_steps=0,
            eval_tokens=1_000,
            calibration_tokens=1_000,
            ce_tokens=0,
            disable_tqdm=True,
        )

    def language_model(self) -> None:
        for _ in self._harvest():
            pass

    def sae_steps(self) -> None:
        options = self.options
        learner = Learner("sae", self.sae(), self.site, Run(self.arguments(".")), options.steps)
        batches = self.activations.split(options.batch_size)
        learner.start(batches[0])
        for step, batch in enumerate(batches):
            learner.step(batch, step)

    def run(self, count: int = 1) -> float:
        """A whole training of `count` SAEs; its own clock leaves out loading and the measuring at the end."""
        with tempfile.TemporaryDirectory() as folder:
            saes = {f"sae{number}": self.sae() for number in range(count)}
            arguments = self.arguments(folder)
            trainer = SAETrainer(self.model, saes, arguments, self.documents, processing_class=self.tokenizer)
            trainer.train()
            return trainer._training_seconds


def seconds(work: Callable[[], float | None], device: torch.device) -> float:
    began = time.perf_counter()
    own = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return own if own is not None else time.perf_counter() - began


def main() -> None:
    options = parse()
    parts = Parts(options)
    works: dict[str, Callable[[], float | None]] = {
        "language model alone": parts.language_model,
        "SAE steps alone": parts.sae_steps,
        "training run": parts.run,
        f"grid of {options.grid} from one pass": lambda: parts.run(options.grid),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work, parts.device))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    model, steps, run, grid = median.values()
    print(f"{parts.tokens:,} tokens, {parts.device}, {torch.get_num_threads()} threads, medians of {options.repeats}")
    for name, value in median.items():
        print(f"{name:26} {value:8.2f} s {parts.tokens / value:12,.0f} tokens/s")
    print(f"training run / (language model + SAE steps) = {run / (model + steps):.2f}")
    print(f"language model / training run               = {model / run:.2f}")
    print(f"grid / one run                              = {grid / run:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"tokens": parts.tokens, "seconds": median, "options": vars(options)}, file, indent=2)


if __name__ == "__main__":
    main()

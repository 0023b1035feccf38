"""How many tokens a second `encode_dataset` writes, beside the language model's pass alone, and in how much memory.

    python benchmarks/encode.py --tokens 1M --repeats 3 --json encode.json

The same documents, cut to the same windows, go through the language model alone (until the SAE's site, and whole with
its head), and through `encode_dataset`; in turns, in one process. Without --sae, an SAE of random latents is made, of
which a threshold leaves the wanted number active. Memory is the process's, sampled while it writes, by quarters of the
time: flat means that the last quarter takes what the second does.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, encode_dataset, load_documents
from hf_msae.cli.parser import parse_int
from hf_msae.corpora.blocks import Block
from hf_msae.corpora.reading import LatentReader
from hf_msae.data import Documents, TokenBatch, as_documents, collate
from hf_msae.data.forward import groups
from hf_msae.language_models import load_language_model
from hf_msae.sites import capture, resolve_site, site_width
from hf_msae.worlds.stories import StoryWorld

# Stories of the package have about a hundred tokens; more are made than are read.
TOKENS_PER_STORY = 80
CALIBRATION_BLOCKS = 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories", help="the language model")
    parser.add_argument("--dataset", help="text; default: stories")
    parser.add_argument("--sae", help="folder or repo; default: random latents")
    parser.add_argument("--site", default="layers.2", help="of the random SAE")
    parser.add_argument("--num-latents", type=parse_int, default=1024, help="of the random SAE")
    parser.add_argument("--k", type=int, default=16, help="active latents per token of the random SAE")
    parser.add_argument("--context-length", type=int, default=128, help="of the random SAE")
    parser.add_argument("--tokens", type=parse_int, default=100_000)
    parser.add_argument("--shard-tokens", type=parse_int, default=262_144)
    parser.add_argument("--lm-batch-size", type=int, default=16)
    parser.add_argument("--pool", choices=("max", "mean", "sum"), help="default: a row a token")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


def make_sae(args: argparse.Namespace, model, tokenizer, documents: Documents) -> MatryoshkaSAE:
    """Random latents, of which about k are active on a token."""
    config = MatryoshkaSAEConfig(
        hidden_size=site_width(model, resolve_site(model, args.site)),
        num_latents=args.num_latents,
        prefix_sizes=[args.num_latents // 16, args.num_latents // 4, args.num_latents],
        k=args.k,
        site=args.site,
        context_length=args.context_length,
        norm_limit=0.0,
    )
    torch.manual_seed(0)
    sae = MatryoshkaSAE(config).eval()
    torch.nn.init.normal_(sae.W_enc, std=config.hidden_size**-0.5)
    reader = LatentReader(model, tokenizer, sae, lm_batch_size=args.lm_batch_size)
    activations = [
        capture(model, [reader.site], **inputs)[reader.site][keep]
        for block in islice(reader.blocks(documents), CALIBRATION_BLOCKS)
        for inputs, keep in passes(block, args.lm_batch_size)
    ]
    sae.calibrate_threshold(activations)
    return sae


def passes(block: Block, lm_batch_size: int) -> Iterator[tuple[dict, torch.Tensor]]:
    """What the language model reads of a block, as `encode_dataset` gives it, and which tokens count."""
    windows = sorted((placed.window for placed in block.windows), key=lambda window: -len(window.input_ids))
    for group in groups(windows, lm_batch_size):
        batch: TokenBatch = collate(group, 0)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch[name] is not None}
        yield inputs, batch["keep"]


def seconds_of(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def memory_mb() -> float:
    """What the process has in memory, where the system tells."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@contextmanager
def sampled_memory(found: list[tuple[float, float]]) -> Iterator[None]:
    """Adds (second, megabytes) to a list while the context is open."""
    done, begun = threading.Event(), time.perf_counter()

    def sample() -> None:
        while not done.wait(0.1):
            found.append((time.perf_counter() - begun, memory_mb()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def by_quarters(samples: list[tuple[float, float]]) -> list[float]:
    """The most memory in each quarter of the time."""
    whole = max((at for at, _ in samples), default=0.0)
    quarters: list[list[float]] = [[], [], [], []]
    for at, megabytes in samples:
        quarters[min(3, int(4 * at / whole)) if whole else 0].append(megabytes)
    return [max(quarter, default=0.0) for quarter in quarters]


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_language_model(args.model)
    if args.dataset is None:
        # Written beforehand: the world would otherwise tell each story when it is read.
        documents = as_documents(list(StoryWorld(seed=0).documents(10 + args.tokens // TOKENS_PER_STORY)))
    else:
        documents = load_documents(args.dataset)
    sae = make_sae(args, model, tokenizer, documents) if args.sae is None else MatryoshkaSAE.from_pretrained(args.sae)
    reader = LatentReader(model, tokenizer, sae.eval(), packing=args.packing, lm_batch_size=args.lm_batch_size)
    reader.find_norm_limit(documents)
    # Kept, so that the language model alone is timed without the tokenizer.
    blocks = list(reader.blocks(documents, max_tokens=args.tokens))
    num_tokens = sum(int(placed.window.keep.sum()) for block in blocks for placed in block.windows)

    @torch.no_grad()
    def run_model(whole: bool) -> None:
        for block in blocks:
            for inputs, _ in passes(block, args.lm_batch_size):
                if whole:
                    model(**inputs, use_cache=False)
                else:
                    capture(model, [reader.site], **inputs)

    seconds: dict[str, list[float]] = {"until the site": [], "whole model": [], "encode": []}
    samples: list[tuple[float, float]] = []
    active = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.repeats):
            seconds["until the site"].append(seconds_of(lambda: run_model(whole=False)))
            seconds["whole model"].append(seconds_of(lambda: run_model(whole=True)))
            folder = Path(scratch) / str(number)
            samples.clear()

            def encode(folder: Path = folder) -> None:
                encode_dataset(
                    model,
                    tokenizer,
                    sae,
                    documents,
                    folder,
                    pool=args.pool,
                    max_tokens=args.tokens,
                    packing=args.packing,
                    lm_batch_size=args.lm_batch_size,
                    shard_tokens=args.shard_tokens,
                )

            with sampled_memory(samples):
                seconds["encode"].append(seconds_of(encode))
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        rows = reader.read(blocks[0])
        active = float(rows.counts.double().mean())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "setting": {**vars(args), "tokens": num_tokens, "active": active, "threads": torch.get_num_threads()},
        "seconds": seconds,
        "tokens_per_second": {name: num_tokens / median for name, median in medians.items()},
        "ratios": {f"encode/{name}": medians["encode"] / medians[name] for name in ("until the site", "whole model")},
        "memory_mb": by_quarters(samples),
        "bytes_per_token": size / num_tokens,
    }
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:>15}  {rate:10,.0f} tokens/s")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    print(f"memory by quarters: {', '.join(f'{megabytes:,.0f}' for megabytes in result['memory_mb'])} MB")
    print(f"{active:.1f} active latents and {result['bytes_per_token']:.0f} bytes a token")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

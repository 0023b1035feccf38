"""Matryoshka SAEs of SAELens and of dictionary_learning, each trained by its own trainer on an activation cache.

    hf-msae cache-activations --model gpt2 --dataset texts.jsonl --site layers.8 --output-dir activations
    .venv-peers/bin/python benchmarks/peers_from_cache.py --cache activations --site layers.8 --num-latents 4096 \\
        --prefix-sizes 128 512 1024 2048 4096 --k 32 --max-tokens 1000000 --output-dir runs/peers
    hf-msae train --dataset activations ... --output-dir runs/ours
    hf-msae eval runs/ours runs/peers/saelens runs/peers/dictionary_learning --model gpt2 --dataset texts.jsonl

The batches are those that `hf-msae train` draws from the cache, in the same order, less the rows that it keeps for
measuring if `--skip-rows` says how many. Settings are each library's own but for the learning rate, if one is given.
Results are saved in each library's own form and converted, so that `hf-msae eval` measures all of them alike.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.data import CachedActivations
from hf_msae.data.cache_files import read_index
from hf_msae.sites import Site

SCALE_BATCHES = 20
PEERS = ("saelens", "dictionary_learning")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="what `hf-msae cache-activations` wrote")
    parser.add_argument("--site", required=True)
    parser.add_argument("--num-latents", type=int, required=True)
    parser.add_argument("--prefix-sizes", type=int, nargs="+", required=True)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, help="default: the library's own")
    parser.add_argument("--skip-rows", type=int, default=0, help="first rows of the cache to leave out")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser.parse_args()


def site_in(options: argparse.Namespace) -> Site:
    """The cache calls a site by the module's whole name."""
    known = read_index(Path(options.cache))["hidden_sizes"]
    names = [name for name in known if f".{name}".removesuffix(":output").endswith(f".{options.site}")]
    if len(names) != 1:
        raise SystemExit(f"--site {options.site}: the cache has {', '.join(known)}.")
    return Site.parse(names[0])


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """Epoch after epoch, (batch_size, hidden_size) in float32."""
    site = site_in(options)
    reader = CachedActivations(
        options.cache,
        batch_size=options.batch_size,
        seed=options.seed,
        sites=[site],
        epochs=1_000,
        skip_rows=options.skip_rows,
    )
    for batch in reader:
        yield batch[site].float()


def train_saelens(options: argparse.Namespace, folder: Path) -> None:
    """`SAETrainer.fit`, with the scaling of inputs that SAELens' tutorials use."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    data = batches(options)
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=next(data).shape[1],
        d_sae=options.num_latents,
        k=options.k,
        matryoshka_widths=options.prefix_sizes,
        normalize_activations="expected_average_only_in",
    )
    steps = options.max_tokens // options.batch_size
    rate = options.learning_rate or SAETrainerConfig.lr
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * options.batch_size,
            train_batch_size_samples=options.batch_size,
            lr=rate,
            # What its own runner fills in; the constant schedule does not use it.
            lr_end=rate / 10,
        ),
        MatryoshkaBatchTopKTrainingSAE(config),
        data_provider=batches(options),
    )
    # Of batches of its own, so that training begins with the first, as everyone's does.
    trainer.activation_scaler.estimate_scaling_factor(config.d_in, batches(options), SCALE_BATCHES)
    trainer.fit().save_inference_model(folder)


def train_dictionary_learning(options: argparse.Namespace, folder: Path) -> None:
    """`MatryoshkaBatchTopKTrainer.update` on activations of unit mean square, folded back at the end, as its
    `trainSAE` does with `normalize_activations=True`.
    """
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    steps = options.max_tokens // options.batch_size
    sizes = options.prefix_sizes
    data = batches(options)
    sample = torch.cat([next(data) for _ in range(SCALE_BATCHES)])
    scale = float(sample.pow(2).sum(-1).mean().sqrt())
    trainer = MatryoshkaBatchTopKTrainer(
        steps=steps,
        activation_dim=sample.shape[1],
        dict_size=options.num_latents,
        k=options.k,
        layer=0,
        lm_name="",
        group_fractions=[(size - inner) / sizes[-1] for size, inner in zip(sizes, [0, *sizes], strict=False)],
        lr=options.learning_rate,
        # Its default, 1,000 steps each, is longer than a short run.
        warmup_steps=min(1_000, steps // 20),
        decay_start=int(steps * 0.8),
        threshold_start_step=min(1_000, steps // 2),
        seed=options.seed,
        device="cpu",
    )
    for number, batch in zip(range(steps), batches(options), strict=False):
        trainer.update(number, batch / scale)
        if number % 50 == 0:
            print(f"dictionary_learning: step {number} of {steps}", flush=True)
    trainer.ae.scale_biases(scale)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer.config, "buffer": {}}, default=str), encoding="utf-8"
    )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    for peer in options.peers:
        torch.manual_seed(options.seed)
        theirs, ours = options.output_dir / f"{peer}-own", options.output_dir / peer
        begin = time.perf_counter()
        {"saelens": train_saelens, "dictionary_learning": train_dictionary_learning}[peer](options, theirs)
        print(f"{peer}: {time.perf_counter() - begin:.0f} s")
        read = {"saelens": MatryoshkaSAE.from_saelens, "dictionary_learning": MatryoshkaSAE.from_dictionary_learning}
        sae = read[peer](theirs, prefix_sizes=options.prefix_sizes)
        sae.config.site = options.site
        sae.save_pretrained(ours)


if __name__ == "__main__":
    main()

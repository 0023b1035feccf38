"""Who takes part in the benchmarks of a training step: a whole step of ours, of each peer, and the encoder's product.

Each peer's step is made of the peer's own code, called as its own trainer calls it: forward, backward, clipping and
projections where it has them, Adam, the decoder's normalisation, the counters of silent latents. Weights are fp32;
bf16 is autocast. Peers are imported by the functions that build them, so that each may be absent.

No latent counts as dead to any contender in the few steps of a benchmark, so nobody pays for an auxiliary loss.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run

# The length that schedules are told; no run here gets so far.
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Setting:
    """One step's sizes, and where it runs."""

    batch_size: int
    hidden_size: int
    num_latents: int
    k: int
    levels: int
    device: str
    bf16: bool

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}.")
        if self.num_latents < 2 ** (self.levels - 1):
            raise ValueError(
                f"Each level has half the latents of the next, so {self.levels} levels need at least "
                f"{2 ** (self.levels - 1):,} latents, got {self.num_latents:,}; take fewer levels or more latents."
            )

    @property
    def prefix_sizes(self) -> list[int]:
        """num_latents and its halves, as many as there are levels."""
        return [self.num_latents >> inward for inward in reversed(range(self.levels))]


class Contender(NamedTuple):
    """`step` takes a batch (batch_size, hidden_size) and its number from 0; `state` gives what outlasts a step."""

    step: Callable[[Tensor, int], object]
    state: Callable[[], Iterable[Tensor]]


class Entry(NamedTuple):
    """How a contender is called, what builds it from a setting and its first batch, and where it comes from.

    `cuda` says that it needs a GPU.
    """

    label: str
    build: Callable[[Setting, Tensor], Contender]
    module: str | None = None
    distribution: str | None = None
    cuda: bool = False

    def version(self) -> str | None:
        """Version of the installed peer; None where it is absent. The distribution's name decides, since another
        project's distribution installs a module `sparsify`, too.
        """
        return next((found.version for found in metadata.distributions(name=self.distribution)), None)


def activations(setting: Setting, count: int) -> list[Tensor]:
    """`count` batches (batch_size, hidden_size): a mean, an eighth of all directions with falling strength, noise."""
    generator = torch.Generator().manual_seed(0)
    rank = max(1, setting.hidden_size // 8)
    strengths = torch.arange(1, rank + 1).pow(-0.5)
    directions = torch.randn(rank, setting.hidden_size, generator=generator)
    mean = torch.randn(setting.hidden_size, generator=generator)
    batches = []
    for _ in range(count):
        common = torch.randn(setting.batch_size, rank, generator=generator) * strengths
        noise = torch.randn(setting.batch_size, setting.hidden_size, generator=generator)
        batches.append((mean + common @ directions + 0.5 * noise).to(setting.device))
    return batches


def with_optimizer(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    yield from parameters
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def bare_product(setting: Setting, first: Tensor) -> Contender:
    """The encoder's product alone, in the precision in which a step makes it."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    W_enc = torch.randn(setting.num_latents, setting.hidden_size, device=setting.device, dtype=dtype)

    @torch.no_grad()
    def step(x: Tensor, number: int) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), W_enc)

    return Contender(step, lambda: [W_enc])


def _learner(
    setting: Setting, first: Tensor, prefix_sizes: list[int], output_size: int | None = None, **of_run: Any
) -> Contender:
    config = MatryoshkaSAEConfig(
        hidden_size=setting.hidden_size,
        hidden_size_out=output_size,
        num_latents=setting.num_latents,
        prefix_sizes=prefix_sizes,
        k=setting.k,
    )
    args = SAETrainingArguments(
        per_device_train_batch_size=setting.batch_size,
        max_steps=MAX_STEPS,
        bf16=setting.bf16,
        tf32=False,
        use_cpu=setting.device == "cpu",
        dead_after_tokens=10_000_000,
        **of_run,
    )
    sae = MatryoshkaSAE(config)
    learner = Learner("sae", sae, Site("layers.0"), Run(args), MAX_STEPS)
    # A transcoder is given the same activations as what it is to reconstruct, which its step cannot know.
    learner.start(first, None if output_size is None else first)
    assert learner.optimizer is not None
    optimizer = learner.optimizer

    def step(x: Tensor, number: int) -> None:
        learner.step(x, number, None if output_size is None else x)

    return Contender(step, lambda: with_optimizer(sae.parameters(), optimizer))


def ours(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, setting.prefix_sizes)


def ours_replayed(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, setting.prefix_sizes, cuda_graphs=True)


def ours_transcoder(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, setting.prefix_sizes, setting.hidden_size)


def ours_plain(setting: Setting, first: Tensor) -> Contender:
    return _learner(setting, first, [setting.num_latents])


def saelens(setting: Setting, first: Tensor) -> Contender:
    """`SAETrainer.step`, which `fit` calls for each batch."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=setting.hidden_size,
        d_sae=setting.num_latents,
        k=setting.k,
        matryoshka_widths=setting.prefix_sizes,
        device=setting.device,
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=MAX_STEPS * setting.batch_size,
        train_batch_size_samples=setting.batch_size,
        # The constant schedule does not use it; SAELens's own runner fills in a tenth of the rate.
        lr_end=3e-5,
        device=setting.device,
        autocast=setting.bf16,
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    trainer = SAETrainer(trainer_config, sae, data_provider=iter(()))

    def step(x: Tensor, number: int) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Contender(step, lambda: with_optimizer(sae.parameters(), trainer.optimizer))


def dictionary_learning(setting: Setting, first: Tensor) -> Contender:
    """`MatryoshkaBatchTopKTrainer.update`, under autocast as in its `trainSAE`, with the threshold estimated from the
    beginning and not from step 1,000, since most steps of a run are later.
    """
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sizes = setting.prefix_sizes
    groups = [size - inner for size, inner in zip(sizes, [0, *sizes], strict=False)]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=MAX_STEPS,
        activation_dim=setting.hidden_size,
        dict_size=setting.num_latents,
        k=setting.k,
        layer=0,
        lm_name="",
        group_fractions=[group / setting.num_latents for group in groups],
        threshold_start_step=0,
        device=setting.device,
    )

    def step(x: Tensor, number: int) -> None:
        with autocast(setting):
            trainer.update(number, x.to(torch.bfloat16) if setting.bf16 else x)

    return Contender(step, lambda: with_optimizer(trainer.ae.parameters(), trainer.optimizer))


def sparsify(setting: Setting, first: Tensor) -> Contender:
    """The step inside `Trainer.fit`, which cannot be had without a language model, with its defaults and torch's Adam.
    A plain TopK SAE: sparsify has no levels. On CUDA its forward pass is bf16 whatever `--dtype` says; a CPU must do
    without its decoder's Triton kernel.
    """
    if setting.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    config = SparseCoderConfig(num_latents=setting.num_latents, k=setting.k)
    sae = SparseCoder(setting.hidden_size, config, device=setting.device, dtype=torch.float32)
    sae.b_dec.data = first.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (setting.num_latents / 2**14) ** 0.5)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1_000, MAX_STEPS)
    silent_tokens = torch.zeros(setting.num_latents, dtype=torch.long, device=setting.device)
    fired = torch.zeros(setting.num_latents, dtype=torch.bool, device=setting.device)

    def step(x: Tensor, number: int) -> float:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        with autocast(setting):
            output = sae(x=x, y=x, total_variance=total_variance)
        fired[output.latent_indices.flatten()] = True
        logged = float(output.fvu.detach())
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        silent_tokens.add_(x.shape[0])
        silent_tokens[fired] = 0
        fired.zero_()
        return logged

    return Contender(step, lambda: with_optimizer(sae.parameters(), optimizer))


def autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16)


CONTENDERS = {
    "gemm": Entry("encoder product alone", bare_product),
    "ours-plain": Entry("ours, 1 level", ours_plain),
    "ours": Entry("ours, {levels} levels", ours),
    "ours-graphs": Entry("ours, {levels} levels, CUDA graphs", ours_replayed, cuda=True),
    "ours-transcoder": Entry("ours, a transcoder of {levels} levels", ours_transcoder),
    "saelens": Entry("SAELens, {levels} levels", saelens, "sae_lens", "sae-lens"),
    "dictionary_learning": Entry(
        "dictionary_learning, {levels} levels", dictionary_learning, "dictionary_learning", "dictionary-learning"
    ),
    "sparsify": Entry("sparsify, plain TopK", sparsify, "sparsify", "eai-sparsify"),
}

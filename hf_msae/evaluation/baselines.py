"""What an SAE's numbers must be seen beside: SAEs trained on the same tokens, and dictionaries that nobody trained.

All are `MatryoshkaSAE`s, so every metric takes them as it takes the SAE that is measured.

- batch_topk: one level, the same width and k. What nesting costs and gains.
- pruned_topk: a plain TopK SAE whose latents are put in order of E[a²] afterwards and cut at the same prefixes
  (arXiv:2505.00190): prefixes without Matryoshka training.
- frozen_decoder: random decoder rows that never learn, only the encoder does (arXiv:2602.14111). Metrics that it does
  well on say little about the dictionary.
- pca: principal components in both directions, as many as the SAE has active latents at each level.
- random: random rows as encoder and decoder, the same k, scaled to fit.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_msae.data.cache import TrainingData
from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations, tokens_at_once
from hf_msae.evaluation.importance import measure_importance, reorder
from hf_msae.evaluation.metric import Subject
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training import SAETrainer, SAETrainingArguments

logger = logging.getLogger(__name__)

TRAINED = ("batch_topk", "pruned_topk", "frozen_decoder")
BUILT = ("pca", "random")
BASELINES = (*TRAINED, *BUILT)


def baseline_config(kind: str, config: MatryoshkaSAEConfig) -> MatryoshkaSAEConfig:
    """The configuration of a trained baseline.

    Args:
        kind: of `TRAINED`.
        config: of the SAE that it is a baseline for.
    """
    activation = "topk" if kind == "pruned_topk" else "batch_topk"
    k = max(1, round(config.k)) if kind == "pruned_topk" else config.k
    return MatryoshkaSAEConfig(
        hidden_size=config.hidden_size,
        num_latents=config.num_latents,
        prefix_sizes=[config.num_latents] if kind != "frozen_decoder" else list(config.prefix_sizes),
        k=k,
        activation=activation,
        site=config.site,
        base_model=config.base_model,
        base_model_revision=config.base_model_revision,
        site_out=config.site_out,
        hidden_size_out=config.hidden_size_out,
        skip=config.skip,
        lookup_size=config.lookup_size,
        lookup_tokenizer=config.lookup_tokenizer,
        lookup_vocabulary=config.lookup_vocabulary,
    )


def train_baselines(
    kinds: Sequence[str],
    config: MatryoshkaSAEConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TrainingData,
    args: SAETrainingArguments,
    eval_dataset: "DocumentsLike | None" = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, MatryoshkaSAE]:
    """Train baselines for an SAE, all from one pass of the language model.

    Args:
        kinds: of `TRAINED`.
        config: of the SAE that they are baselines for.
        model: the language model.
        tokenizer: its own.
        dataset: as `SAETrainer` takes it.
        args: how to train; what is written goes to `args.output_dir`, a folder for each where there are several.
        eval_dataset: as `SAETrainer` takes it.
        callbacks: as `SAETrainer` takes them.

    Returns:
        By their kinds, in evaluation mode on the model's device.

    Raises:
        HfMsaeError: as `SAETrainer` raises it.
    """
    saes = {kind: MatryoshkaSAE(baseline_config(kind, config)) for kind in kinds}
    if "frozen_decoder" in saes:
        saes["frozen_decoder"].W_dec.register_hook(torch.zeros_like)
    trainer = SAETrainer(model, saes, args, dataset, eval_dataset, tokenizer, callbacks)
    trainer.train()
    folder = Path(args.output_dir)
    return {
        kind: MatryoshkaSAE.from_pretrained(folder / kind if len(saes) > 1 else folder).to(model.device).eval()
        for kind in kinds
    }


def make_baselines(
    kinds: Sequence[str],
    subject: Subject,
    text: TextActivations,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TrainingData,
    eval_dataset: "DocumentsLike | None" = None,
    *,
    args: SAETrainingArguments | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Subject]:
    """The baselines of an SAE, each with its seeds; a seed is part of a name where there are several.

    Args:
        kinds: of `BASELINES`.
        subject: the SAE that they stand beside.
        text: the activations to fit those that are built, and the language model.
        tokenizer: the language model's.
        dataset: what is trained on, as [`SAETrainer`] takes it.
        eval_dataset: what is measured on, likewise.
        args: how baselines are trained, each seed in a folder of its own below `output_dir`; needed for those of
            `TRAINED`.
        seeds: of trained and random ones; the principal components have none.

    Raises:
        InputError: there is no such baseline, or one is to be trained and `args` is None.
    """
    check_baselines(kinds)
    if subject.sae.config.is_transcoder and set(kinds) & set(BUILT):
        logger.warning("Left out: %s, which reconstruct what they read.", ", ".join(BUILT))
        kinds = [kind for kind in kinds if kind not in BUILT]
    config, device, found = subject.sae.config, subject.sae.device, []
    trained = [name for name in kinds if name in TRAINED]
    if trained and args is None:
        raise InputError(f"{', '.join(trained)} must be trained; give args, the training arguments.")
    for seed in seeds:
        label = f" seed {seed}" if len(seeds) > 1 else ""
        saes: dict[str, MatryoshkaSAE] = {}
        if trained and args is not None:
            own = replace(args, seed=seed, output_dir=str(Path(args.output_dir) / f"seed-{seed}"))
            saes = train_baselines(trained, config, text.model, tokenizer, dataset, own, eval_dataset)
        if "pruned_topk" in saes:
            saes["pruned_topk"] = prune(saes["pruned_topk"], text.x, config.prefix_sizes)
        if "random" in kinds:
            saes["random"] = build_random(text.x, config, seed)
        found += [Subject(kind + label, kind, sae.to(device)) for kind, sae in saes.items()]  # type: ignore[arg-type]
    if "pca" in kinds:
        latents = [subject.sae.encode(x) > 0 for x in text.x[:10_000].to(device).split(2048)]
        rate = torch.cat(latents).double().mean(0)
        l0 = [rate[:prefix].sum().item() for prefix in config.prefix_sizes]
        pca = build_pca(text.x, config, l0)
        found.append(Subject("pca", "pca", pca.to(device)))  # type: ignore[arg-type]
    return found


def prune(sae: MatryoshkaSAE, x: Tensor, prefix_sizes: Sequence[int]) -> MatryoshkaSAE:
    """The same SAE with its latents in order of E[a²‖d‖²], the largest first, cut at these prefixes.

    Args:
        sae: usually of one level.
        x: activations that the order is found on, (n, hidden_size).
        prefix_sizes: the new levels.
    """
    importance = measure_importance(sae, x.split(tokens_at_once(sae)))
    return reorder(sae, importance.contribution.argsort(descending=True), prefix_sizes)


@torch.no_grad()
def build_pca(x: Tensor, config: MatryoshkaSAEConfig, l0: Iterable[float]) -> MatryoshkaSAE:
    """Principal components in both directions, as an SAE.

    Latents 2i and 2i + 1 are the two directions of component i, of which one is active at a time.

    Args:
        x: activations, (n, hidden_size).
        config: of the SAE that it is a baseline for.
        l0: that SAE's active latents per level. The prefixes have as many components, rounded, and at last all.
    """
    doubles = x.double()
    mean = doubles.mean(0)
    _, vectors = torch.linalg.eigh((doubles - mean).T @ (doubles - mean))
    components = vectors.flip(1).T.float()
    hidden_size = config.hidden_size
    sizes = sorted({2 * min(hidden_size, max(1, round(value))) for value in l0} | {2 * hidden_size})
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(
            hidden_size=hidden_size,
            num_latents=2 * hidden_size,
            prefix_sizes=sizes,
            k=hidden_size,
            activation="relu",
            site=config.site,
            base_model=config.base_model,
        )
    ).eval()
    rows = torch.stack([components, -components], 1).flatten(0, 1)
    sae.W_enc.copy_(rows)
    sae.W_dec.copy_(rows)
    sae.b_dec.copy_(mean)
    return sae


@torch.no_grad()
def build_random(x: Tensor, config: MatryoshkaSAEConfig, seed: int) -> MatryoshkaSAE:
    """Random unit rows as decoder and, up to one scale, as encoder.

    The scale is the one that reconstructs the activations best; the threshold is set for the same k.

    Args:
        x: activations, (n, hidden_size).
        config: of the SAE that it is a baseline for.
        seed: of the rows.
    """
    values: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_latents": config.num_latents,
        "prefix_sizes": list(config.prefix_sizes),
        "k": config.k,
        "activation": "batch_topk",
        "site": config.site,
        "base_model": config.base_model,
    }
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**values)).eval()
    rows = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.nn.functional.normalize(rows, dim=1)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(rows)
    sae.b_dec.copy_(x.double().mean(0))
    parts = x.split(tokens_at_once(sae))
    sae.calibrate_threshold(parts)
    products, squares = 0.0, 0.0
    for part in parts:
        change = (sae.decode(sae.encode(part)) - sae.b_dec).double()
        products += (change * (part - sae.b_dec)).sum().item()
        squares += change.pow(2).sum().item()
    scale = products / max(squares, 1e-30)
    sae.W_enc.mul_(scale)
    sae.threshold.mul_(scale)
    return sae


def check_baselines(kinds: Sequence[str]) -> None:
    """Check that all of these are baselines.

    Args:
        kinds: names.

    Raises:
        InputError: a name is no baseline's.
    """
    unknown = [kind for kind in kinds if kind not in BASELINES]
    if unknown:
        raise InputError(f"There is no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}.")

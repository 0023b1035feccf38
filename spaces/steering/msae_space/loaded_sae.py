"""An SAE that is open, with its language model; and the error that says what a visitor cannot have.

Nothing here changes after it is loaded, so it is safe to share. What a visitor does is kept in the page's own state.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae import MatryoshkaSAE
from hf_msae.errors import HfMsaeError
from hf_msae.sites import Site

# What Python takes for a module of a model, and for what is known of a latent (numbers, name, words, edges).
MODULE_BYTES, LATENT_BYTES = 8 << 10, 2 << 10
# How the configurations of language models call the number of their positions.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class SpaceError(HfMsaeError, ValueError):
    """A visitor asked for something that cannot be had."""


@dataclass(frozen=True)
class Key:
    """Which SAE.

    Args:
        source: A Hub repo or a folder.
        subfolder: The folder in it.
    """

    source: str
    subfolder: str = ""


@dataclass(frozen=True, eq=False)
class Language:
    """A language model, for all SAEs that read it.

    Args:
        model: The model, which visitors share.
        tokenizer: Its tokenizer.
        untouched: Modules of its own with the same weights, which nobody runs, so that no hook of a visitor is ever on
            them when others are made from them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    untouched: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Language":
        """Of a model that nobody runs yet."""
        return cls(model, tokenizer, own_modules(model))

    @cached_property
    def num_bytes(self) -> int:
        """Of its weights and modules."""
        return tensor_bytes(self.model) + 2 * modules_bytes(self.model)

    @cached_property
    def num_positions(self) -> int | None:
        """Tokens that the model can read at once; None where it has no bound."""
        config = self.model.config.get_text_config().to_dict()
        return next((config[name] for name in POSITIONS if config.get(name)), None)


def own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """The model with modules of its own and the same weights, so that hooks on one do not touch the other.

    Nobody may run the model meanwhile.
    """
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass(frozen=True, eq=False)
class LoadedSAE:
    """An SAE and the language model whose activations it reads.

    Args:
        key: Where the SAE comes from.
        sae: The SAE, in evaluation mode.
        language: Its language model.
        site: Where it reads, found in the model.
        special_ids: Tokens that are never read or steered.
        maxima: Each latent's largest activation in training. In plain numbers, as the next two, because on ZeroGPU the
            SAE's own can be read only while a GPU is lent.
        firing_rates: Share of tokens on which each latent fired in training.
        row_norms: Length of each latent's decoder row.
        mean_norm: Mean length of the activations at the site.
    """

    key: Key
    sae: MatryoshkaSAE
    language: Language
    site: Site
    special_ids: frozenset[int]
    maxima: list[float]
    firing_rates: list[float]
    row_norms: list[float]
    mean_norm: float

    @property
    def model(self) -> PreTrainedModel:
        """The language model."""
        return self.language.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        return self.language.tokenizer

    @property
    def prefix_sizes(self) -> list[int]:
        """Number of latents of each level."""
        return list(self.sae.config.prefix_sizes)

    @cached_property
    def num_bytes(self) -> int:
        """Of the SAE and of what is known about its latents; the language model's are counted once for all."""
        # Two sets of the model's modules: for what is learnt in the background, and for searches.
        return sae_bytes(tensor_bytes(self.sae), len(self.maxima)) + 2 * modules_bytes(self.model)

    def level_of(self, latent: int) -> int:
        """The first level that has the latent, counted from 0."""
        return next(level for level, size in enumerate(self.prefix_sizes) if latent < size)

    def share_of_maximum(self, latent: int, value: float) -> float:
        """An activation as a share of the largest that the latent had in training; 0 where it had none."""
        return value / self.maxima[latent] if self.maxima[latent] > 0 else 0.0

    def level_name(self, level: int) -> str:
        """A level's number, which counts from 0, and its size."""
        return f"level {level} · first {self.prefix_sizes[level]:,} latents"

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Tokens as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def checked(self, latent: int) -> int:
        """The latent.

        Raises:
            SpaceError: The SAE has none of that number.
        """
        if not 0 <= latent < self.sae.config.num_latents:
            raise SpaceError(f"This SAE has latents 0 to {self.sae.config.num_latents - 1:,}; there is no {latent:,}.")
        return latent

    def here(self, latent: int | None) -> int | None:
        """The latent, or None for one of an SAE that was open before."""
        return latent if latent is not None and latent < self.sae.config.num_latents else None


def tensor_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers, those that it has several times counted once."""
    return _bytes([*module.parameters(), *module.buffers()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.numel() * tensor.itemsize for tensor in tensors}.values())


def modules_bytes(model: nn.Module) -> int:
    """Of its modules without their weights."""
    return MODULE_BYTES * sum(1 for _ in model.modules())


def sae_bytes(weights: int, num_latents: int) -> int:
    """Of an SAE whose weights have so many, with what is known about its latents."""
    return weights + LATENT_BYTES * num_latents


def first_line(error: Exception) -> str:
    """What an error says, as one sentence for a visitor."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return line if line.endswith(".") else f"{line}."

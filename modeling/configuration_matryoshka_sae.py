# Copyright 2026 The hf_msae authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of a Matryoshka sparse autoencoder: its shape, its training loss, and where its activations come from.

Nonsense is refused here, in words, because everything after (a day on eight GPUs, a push to the Hub) is more
expensive. No `from __future__ import annotations` in this file: it would turn the types into strings and switch
validation off.
"""

import math
from itertools import pairwise

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from .untrusted import DTYPES, SAEError, read_json, shown, weight_shapes

ACTIVATIONS = ("batch_topk", "topk", "jumprelu", "relu")
INFERENCE = ("threshold", "topk")
QUANTIZATIONS = ("4bit", "8bit")
LEVEL_WEIGHTS = ("uniform", "size")
PREFIX_SAMPLING = ("fixed", "pareto")
# The nested sizes used when none are given are the dictionary's over these: every level doubles it.
DEFAULT_PREFIX_DIVISORS = (16, 8, 4, 2, 1)
# Every level costs a pass over the activations, in training and in all that measures.
MAX_LEVELS = 1024
# What a latent's index is stored as, where pages and steerings name it.
MAX_SIZE = 2**31 - 1
# Keys that transformers puts into a configuration without declaring them as fields, of which an SAE keeps these,
KEPT_KEYS = frozenset({"auto_map", "model_type", "name_or_path", "torch_dtype"})
# and to which these, or the classes of a classifier, mean nothing: they are left out.
IGNORED_KEYS = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
    }
)
IGNORED_FIELDS = ("id2label", "label2id", "problem_type")


def default_prefix_sizes(num_latents: int) -> list[int]:
    """Sizes 1/16, 1/8, 1/4, 1/2 and all of `num_latents`; sizes that coincide in a tiny dictionary are given once."""
    return sorted({max(1, num_latents // divisor) for divisor in DEFAULT_PREFIX_DIVISORS})


def _too_many(levels: int) -> str:
    return (
        f"prefix_sizes must be at most {MAX_LEVELS:,} levels, got {levels:,}: each costs a pass over the activations."
    )


# trf-ignore: TRF057 (the docstring is written by hand: it must read the same where the file is remote code)
@strict
class MatryoshkaSAEConfig(PreTrainedConfig):
    r"""Configuration of a [`MatryoshkaSAE`].

    > Shape

    hidden_size (`int`, *optional*, defaults to 768):
        Size of the activations (alias `d_in`).
    num_latents (`int`, *optional*, defaults to 16384):
        Size of the whole dictionary (alias `d_sae`).
    prefix_sizes (`list[int]`, *optional*):
        The nested dictionary sizes m_1 < ... < m_G, the last being `num_latents`. Each prefix reconstructs alone.
        Defaults to 1/16, 1/8, 1/4, 1/2 and all of `num_latents`. One size makes a plain SAE.
    k (`float`, *optional*, defaults to 32):
        Mean number of active latents per token of the whole dictionary: exact for `batch_topk` and `topk`, the target
        of the sparsity penalty for `jumprelu` and `relu`.
    activation (`str`, *optional*, defaults to `"batch_topk"`):
        `"batch_topk"` (the `k` × batch largest, one selection over the whole dictionary; arXiv:2412.06410), `"topk"`
        (the `k` largest of each token; arXiv:2406.04093), `"jumprelu"` (a learnt threshold per latent;
        arXiv:2407.14435) or `"relu"`.
    inference (`str`, *optional*, defaults to `"threshold"`):
        What stays active in evaluation mode: `"threshold"` keeps what exceeds the stored threshold, so that what a
        prefix does never depends on later latents; `"topk"` the `k` largest of each token among the latents asked
        for, as plain TopK SAEs of other libraries do, which have no threshold.
    apply_b_dec_to_input (`bool`, *optional*, defaults to `True`):
        Whether the decoder bias is subtracted before encoding. A transcoder never does it, because its bias is of the
        activations that it writes.
    hidden_size_out (`int`, *optional*):
        Makes a transcoder, which reads activations of one site and reconstructs those of another: the size of these;
        `hidden_size` where only `site_out` is given.
    aligned (`bool`, *optional*, defaults to `False`):
        Keep the inner product of each latent's encoder and decoder row at 1 (aligned training, arXiv:2605.18629): the
        encoder row is the decoder row and a learnt remainder at right angles to it. A trainer holds it, as it holds
        decoder rows at norm 1; the weights are stored as any others.
    skip (`bool`, *optional*, defaults to `False`):
        Whether a transcoder also adds a linear map of what it reads, `W_skip` (arXiv:2501.18823), to every level.
    lookup_size (`int`, *optional*):
        Makes a tokenized SAE (arXiv:2502.17332), which adds a learnt vector of the activation's own token, a row of
        `W_token`, to every level: the number of token ids. Latents then need not say which token it is.
    lookup_tokenizer (`str`, *optional*), lookup_vocabulary (`str`, *optional*):
        The tokenizer whose ids these are, and the SHA-256 of its vocabulary.

    > Training loss (arXiv:2503.17547 unless said)

    level_weights (`str` or `list[float]`, *optional*, defaults to `"uniform"`):
        Weight of each level's squared error, normalised to sum to 1: `"uniform"`, `"size"` (proportional to the size
        of the group of latents that a level adds) or one number a level.
    balance (`float`, *optional*):
        Weight c^(levels inward) instead: the full dictionary weighs 1, the level inside it c, then c²
        (arXiv:2505.11756; 0.75 is a good first try). Excludes `level_weights`.
    detach_prefixes (`bool`, *optional*, defaults to `False`):
        Stop each level's gradient from reaching the latents of the levels inside it.
    inner_decoder_share (`float`, *optional*, defaults to 1.0):
        Share of the gradient of all levels but the whole dictionary's that reaches `W_dec` and `b_dec`. With 0 the
        decoder follows the whole dictionary's error alone: a narrow prefix alone is best off where a parent's row
        mixes in its children's (hedging, arXiv:2505.11756), and the whole is not. A trainer keeps 1 until
        `inner_share_start`, because at the beginning inner levels decide which latents become the general ones.
    inner_activation_share (`float`, *optional*, defaults to 1.0):
        The same of the gradient that reaches latent activations, and through them the encoder.
    log_loss (`bool`, *optional*, defaults to `False`):
        Take the logarithm of each level's error before weighing.
    prefix_sampling (`str`, *optional*, defaults to `"fixed"`):
        `"fixed"` trains `prefix_sizes`; `"pareto"` draws new sizes every step, small ones more often, and always adds
        the whole dictionary (Nabeshima's recipe). `prefix_sizes` are then the levels that are reported.
    num_sampled_prefixes (`int`, *optional*, defaults to 10):
        How many sizes a step draws with `prefix_sampling="pareto"`, the whole dictionary included.
    pareto_alpha (`float`, *optional*, defaults to 0.5):
        Exponent of that draw, in (0, 1]; 1 is uniform.
    aux_loss_weight (`float`, *optional*, defaults to 1/32):
        Weight of the auxiliary loss, by which latents that never fire learn to reconstruct what is left over.
    num_aux_latents (`int`, *optional*):
        How many dead latents a token uses in that loss; half of `hidden_size` if not given.
    sparsity_weight (`float`, *optional*, defaults to 0.01):
        Weight of the sparsity penalty of `relu` (where a controller moves it until L0 is `k`) and `jumprelu`.
    p_end (`float`, *optional*, defaults to 1.0):
        The p of the penalty Σ f^p of `relu`, in (0, 1]; 1 is L1. Below 1, small activations cost more and large ones
        hardly more than those of middle size, so that what is left shrinks less. A trainer begins with 1 and lets p
        fall from `p_anneal_start` on (p-annealing, arXiv:2408.00113, with 0.2).
    jumprelu_bandwidth (`float`, *optional*, defaults to 0.5):
        Width of the kernel through which thresholds get their gradient, in units of the activations' standard
        deviation per dimension.

    > Where the activations come from

    base_model (`str`, *optional*), base_model_revision (`str`, *optional*):
        The language model, and its commit.
    base_model_quantization (`str`, *optional*):
        To how many bits bitsandbytes had quantized it, `"4bit"` or `"8bit"`.
    adapter (`str`, *optional*), adapter_revision (`str`, *optional*):
        The PEFT adapter that was on it, and the adapter's commit.
    site (`str`, *optional*):
        The place in it, as a module path and side: `model.layers.12:output`.
    site_out (`str`, *optional*):
        The place whose activations a transcoder reconstructs, such as `model.layers.12.mlp:output` where it reads
        `model.layers.12.mlp:input`.
    prepend_bos (`bool`, *optional*, defaults to `True`):
        Whether each token window began with the tokenizer's BOS token. Special tokens never reach the SAE.
    context_length (`int`, *optional*):
        Tokens in a window.
    norm_limit (`float`, *optional*):
        The largest norm of an activation that counted, in training and in everything that was measured: what is beyond
        is an attention sink. 0 where all counted; None where it is not known, as of other libraries' SAEs. It says
        which tokens to look at; what the SAE computes does not depend on it.
    norm_limit_out (`float`, *optional*):
        The same of the activations that a transcoder reconstructs.
    converted_from (`str`, *optional*):
        The library whose checkpoint this was.
    measured (`dict`, *optional*):
        What the training run measured on held-out tokens: `tokens`, and `l0` and `fve` per prefix.
    """

    model_type = "matryoshka_sae"
    attribute_map = {"d_in": "hidden_size", "d_sae": "num_latents"}

    hidden_size: int = 768
    num_latents: int = 16384
    prefix_sizes: list[int] | tuple[int, ...] = ()
    k: float | int = 32
    activation: str = "batch_topk"
    inference: str = "threshold"
    apply_b_dec_to_input: bool = True
    hidden_size_out: int | None = None
    aligned: bool = False
    skip: bool = False
    lookup_size: int | None = None
    lookup_tokenizer: str | None = None
    lookup_vocabulary: str | None = None
    level_weights: str | list[float | int] | tuple[float | int, ...] = "uniform"
    balance: float | int | None = None
    detach_prefixes: bool = False
    inner_decoder_share: float | int = 1.0
    inner_activation_share: float | int = 1.0
    log_loss: bool = False
    prefix_sampling: str = "fixed"
    num_sampled_prefixes: int = 10
    pareto_alpha: float | int = 0.5
    aux_loss_weight: float | int = 1 / 32
    num_aux_latents: int | None = None
    sparsity_weight: float | int = 0.01
    p_end: float | int = 1.0
    jumprelu_bandwidth: float | int = 0.5
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_quantization: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    site: str | None = None
    site_out: str | None = None
    prepend_bos: bool = True
    context_length: int | None = None
    norm_limit: float | int | None = None
    norm_limit_out: float | int | None = None
    converted_from: str | None = None
    measured: dict | None = None

    def __post_init__(self, **kwargs):
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        kwargs = self._known_keys(kwargs)
        for name in IGNORED_FIELDS:
            setattr(self, name, None)
        self._refuse_other_dtypes(kwargs.get("torch_dtype"))
        if self.site_out is not None and self.hidden_size_out is None:
            self.hidden_size_out = self.hidden_size
        self.apply_b_dec_to_input = self.apply_b_dec_to_input and not self.is_transcoder
        self.prefix_sizes = list(self.prefix_sizes) or default_prefix_sizes(self.num_latents)
        if not isinstance(self.level_weights, str):
            self.level_weights = list(self.level_weights)
        super().__post_init__(**kwargs)

    def _known_keys(self, kwargs: dict) -> dict:
        unknown = sorted(key for key in kwargs if key not in KEPT_KEYS | IGNORED_KEYS and not key.startswith("_"))
        if unknown:
            known = ", ".join(sorted(type(self).__annotations__))
            raise SAEError(f"MatryoshkaSAEConfig got unknown key(s) {shown(unknown)[1:-1]}. Known keys: {known}.")
        return {key: value for key, value in kwargs.items() if key in KEPT_KEYS}

    def _refuse_other_dtypes(self, torch_dtype: object) -> None:
        for value in (self.dtype, torch_dtype):
            if value is not None and str(value).removeprefix("torch.") not in DTYPES:
                raise SAEError(f"dtype must be one of {', '.join(DTYPES)}, got {value!r}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but any file that holds no JSON object raises `ValueError` or `OSError`, in words."""
        try:
            content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (RecursionError, TypeError, AttributeError) as error:
            raise SAEError(
                f"The config.json of {pretrained_model_name_or_path} holds no JSON object that can be read "
                f"({error}). Save or download it again."
            ) from error
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; so many levels that only checking them would take long raise `ValueError` at once."""
        sizes = config_dict.get("prefix_sizes")
        if isinstance(sizes, list | tuple) and len(sizes) > MAX_LEVELS:
            raise SAEError(_too_many(len(sizes)))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As in transformers, with the checks of `from_pretrained`."""
        try:
            return cls.from_dict(read_json(json_file))
        except StrictDataclassError as error:
            # A folder may hold many; the error's own words do not say which.
            raise SAEError(f"{json_file}: {error.__cause__ or error}") from error
        except ValueError as error:
            raise SAEError(f"{json_file}: {error}") from error

    # Each method named validate_* runs after construction and again before saving, in alphabetical order.

    def validate_counts(self):
        """Refuse sizes that are none, and k beyond the dictionary."""
        names = ("hidden_size", "num_latents", "num_aux_latents", "num_sampled_prefixes", "context_length")
        for name in (*names, "hidden_size_out", "lookup_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIZE:
                bound = "at least 1" if value < 1 else f"at most {MAX_SIZE:,}"
                raise SAEError(f"{name} must be {bound}, got {value!r:.40}.")
        if not 0 < self.k <= self.num_latents:
            raise SAEError(
                f"k must be above 0 and at most num_latents={self.num_latents}, got {self.k}: it is the mean number "
                "of latents active per token."
            )

    def validate_prefix_sizes(self):
        """Refuse sizes that are not nested, or do not end in the dictionary."""
        sizes = self.prefix_sizes
        if len(sizes) > MAX_LEVELS:
            raise SAEError(_too_many(len(sizes)))
        if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
            raise SAEError(
                f"prefix_sizes must be positive and strictly increasing, got {shown(sizes)}. They are sizes of nested "
                "prefixes (64, 128, 256), not increments (64, 64, 128)."
            )
        if sizes[-1] != self.num_latents:
            raise SAEError(
                f"The last of prefix_sizes must be num_latents={self.num_latents}, got {shown(sizes)}. Append "
                f"{self.num_latents} or set num_latents={sizes[-1]}."
            )

    def validate_choices(self):
        """Refuse values that are no choice."""
        options = (("activation", ACTIVATIONS), ("inference", INFERENCE), ("prefix_sampling", PREFIX_SAMPLING))
        for name, choices in options:
            if getattr(self, name) not in choices:
                raise SAEError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.base_model_quantization not in (None, *QUANTIZATIONS):
            raise SAEError(
                f"base_model_quantization must be one of {', '.join(QUANTIZATIONS)} or None, got "
                f"{self.base_model_quantization!r:.40}."
            )

    def validate_level_weights(self):
        """Refuse weights that do not fit the levels, or one another."""
        weights = self.level_weights
        if self.balance is not None:
            if not 0 <= self.balance < math.inf:
                raise SAEError(f"balance must be finite and not negative, got {self.balance}; 0.75 is a good start.")
            if weights != "uniform":
                raise SAEError(f"Give balance={self.balance} or level_weights={weights!r}, not both.")
        if isinstance(weights, str):
            if weights not in LEVEL_WEIGHTS:
                raise SAEError(
                    f"level_weights must be one of {', '.join(LEVEL_WEIGHTS)} or a list of numbers, got {weights!r}."
                )
        elif len(weights) != len(self.prefix_sizes) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise SAEError(
                f"level_weights must be {len(self.prefix_sizes)} numbers, one per prefix of "
                f"{shown(self.prefix_sizes)}, none negative, all finite and not all zero; got {shown(weights)}."
            )
        if self.prefix_sampling == "pareto" and (weights != "uniform" or self.balance is not None):
            raise SAEError("prefix_sampling='pareto' draws new levels every step, so it takes only uniform weights.")

    def validate_inner_shares(self):
        """Refuse shares that are none, and those of a gradient that is stopped anyway."""
        for name in ("inner_decoder_share", "inner_activation_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise SAEError(f"{name} must be from 0 to 1, got {share}; 1 is the whole gradient of inner levels.")
            if share < 1 and self.detach_prefixes:
                raise SAEError(
                    f"Give {name}={share} or detach_prefixes=True, not both: each changes where gradients of inner "
                    "levels go, and together inner latents would hardly learn."
                )

    def validate_ranges(self):
        """Refuse numbers out of their range."""
        for name in ("aux_loss_weight", "sparsity_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SAEError(f"{name} must be finite and not negative, got {getattr(self, name)}.")
        for name in ("norm_limit", "norm_limit_out"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < math.inf:
                raise SAEError(f"{name} must be finite and not negative (0 is no limit), got {limit}.")
        if not 0 < self.p_end <= 1:
            raise SAEError(f"p_end must be in (0, 1], got {self.p_end}; 1 is the L1 penalty, 0.2 the paper's.")
        if self.p_end < 1 and self.activation != "relu":
            raise SAEError(
                f"p_end={self.p_end} is the exponent of relu's penalty, and {self.activation!r} has no such penalty: "
                "set activation='relu', or leave p_end out."
            )
        if not 0 < self.jumprelu_bandwidth < math.inf:
            raise SAEError(f"jumprelu_bandwidth must be finite and above 0, got {self.jumprelu_bandwidth}.")
        if not 0 < self.pareto_alpha <= 1:
            raise SAEError(f"pareto_alpha must be in (0, 1], got {self.pareto_alpha}.")

    def validate_measured(self):
        """Refuse numbers that are not as a training run writes them."""
        measured = self.measured or {}
        for name, value in measured.items():
            numbers = value if isinstance(value, list) else [value]
            right = len(numbers) <= self.num_levels and all(isinstance(one, int | float | str) for one in numbers)
            if not right or (name in ("l0", "fve") and (type(value) is not list or str in map(type, value))):
                raise SAEError(
                    "measured must hold the number of `tokens`, and lists of a number per level as `l0` and `fve`; "
                    f"got {shown([repr(one)[:40] for one in numbers])} as {name}."
                )
        if type(measured.get("tokens", 0)) is not int or len(measured.get("l0", ())) < len(measured.get("fve", ())):
            raise SAEError("measured must hold a whole number of `tokens`, and as many numbers in `l0` as in `fve`.")

    def validate_topk(self):
        """Refuse ranking where it has no meaning."""
        if "topk" in (self.activation, self.inference) and int(self.k) != self.k:
            raise SAEError(
                f"activation='topk' and inference='topk' keep k latents of a token, so k must be whole; got {self.k}."
            )
        if self.inference == "topk" and self.activation != "topk":
            raise SAEError(f"inference='topk' goes with activation='topk' only, got {self.activation!r}.")

    def validate_transcoder(self):
        """Refuse what only a transcoder has, in an SAE, and one that writes where it reads."""
        if self.hidden_size_out is None:
            for name in ("site_out", "skip", "norm_limit_out"):
                if getattr(self, name):
                    raise SAEError(
                        f"{name}={getattr(self, name)!r} is of a transcoder: give site_out and hidden_size_out, "
                        f"where and how wide the activations are that it reconstructs, or leave {name} out."
                    )
        elif self.aligned:
            raise SAEError(
                "aligned=True keeps the inner product of encoder and decoder rows at 1, and a transcoder's have none: "
                "they are of different places. Leave aligned out, or site_out and hidden_size_out."
            )
        elif self.site is not None and self.site == self.site_out:
            raise SAEError(
                f"site and site_out are both {self.site}: what reconstructs its own input is an SAE, so leave "
                "site_out and hidden_size_out out."
            )
        elif self.apply_b_dec_to_input:
            raise SAEError("A transcoder's decoder bias is of what it writes: set apply_b_dec_to_input=False.")

    def truncated(self, prefix: int) -> "MatryoshkaSAEConfig":
        """The configuration of the first `prefix` latents as a model of their own.

        Levels inside the prefix stay; the prefix becomes the last level. `k` becomes the L0 measured for this prefix
        where the training run measured it.
        """
        if not 1 <= prefix <= self.num_latents:
            raise SAEError(f"prefix must be from 1 to num_latents={self.num_latents}, got {prefix}.")
        values = self.to_dict()
        inner = [size for size in self.prefix_sizes if size < prefix]
        kept = [index for index, size in enumerate(self.prefix_sizes) if size <= prefix]
        values.update(num_latents=prefix, prefix_sizes=[*inner, prefix], k=min(self.k, prefix))
        if not isinstance(self.level_weights, str):
            kept_weights = list(self.level_weights[: len(inner) + 1])
            # Only the levels outside this prefix may have been trained: then no weights are left to keep.
            values["level_weights"] = kept_weights if any(kept_weights) else "uniform"
        if self.measured is not None:
            per_level = {name: value for name, value in self.measured.items() if isinstance(value, list)}
            values["measured"] = self.measured | {name: [v[i] for i in kept] for name, v in per_level.items()}
            ranked = self.inference == "topk"  # then k says what a prefix computes, too
            if prefix in self.prefix_sizes and prefix < self.num_latents and "l0" in per_level and not ranked:
                measured_l0 = per_level["l0"][self.prefix_sizes.index(prefix)]
                values["k"] = max(1, round(measured_l0)) if self.activation == "topk" else measured_l0 or 1
        return type(self)(**values)

    @property
    def is_transcoder(self) -> bool:
        """Whether what is reconstructed are the activations of another site than those that are read."""
        return self.hidden_size_out is not None

    @property
    def is_tokenized(self) -> bool:
        """Whether reconstructions begin with a vector of the activation's own token."""
        return self.lookup_size is not None

    @property
    def output_size(self) -> int:
        """Size of the activations that are reconstructed."""
        return self.hidden_size if self.hidden_size_out is None else self.hidden_size_out

    @property
    def output_site(self) -> str | None:
        """The site whose activations are reconstructed."""
        return self.site_out if self.is_transcoder else self.site

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint and their shapes."""
        return weight_shapes(self.num_latents, self.hidden_size, self.output_size, self.skip, self.lookup_size)

    @property
    def num_levels(self) -> int:
        """Number of nested prefixes."""
        return len(self.prefix_sizes)

    @property
    def normalized_level_weights(self) -> list[float]:
        """The weight of each level's loss, summing to 1."""
        if self.balance is not None:
            weights = [float(self.balance) ** inward for inward in range(self.num_levels - 1, -1, -1)]
        elif self.level_weights == "uniform":
            weights = [1.0] * self.num_levels
        elif self.level_weights == "size":
            weights = [float(high - low) for low, high in pairwise([0, *self.prefix_sizes])]
        else:
            weights = [float(weight) for weight in self.level_weights]
        total = sum(weights)
        return [weight / total for weight in weights]


__all__ = ["MatryoshkaSAEConfig"]

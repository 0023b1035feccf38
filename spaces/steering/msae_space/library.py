"""The SAEs that are open, each with its language model: loaded once, shared by all who look at them, few at a time.

Nothing here changes after it is loaded, so it is safe to share. What a visitor does is kept in the page's own state.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_msae import MatryoshkaSAE, SAEEntry, list_saes
from hf_msae.hub import STORIES
from hf_msae.sites import Site, resolve_site
from hf_msae.worlds.stories import load_story_lm
from msae_space.zerogpu import find_zerogpu

NUM_OPEN = 3
# Room for activations, caches and the SAE beside the language model's weights.
SPARE_BYTES = 2 * 2**30


class SpaceError(ValueError):
    """What a visitor asked for and cannot have, in words."""


@dataclass(frozen=True)
class Key:
    """Which SAE: a Hub repo or a folder, and the subfolder in it."""

    source: str
    subfolder: str = ""


@dataclass(frozen=True, eq=False)
class Workbench:
    """An SAE and the language model whose activations it reads.

    maxima, firing_rates, row_norms: one a latent; in plain numbers, because on ZeroGPU the SAE's own can be read only
    while a GPU is lent.
    """

    key: Key
    sae: MatryoshkaSAE
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    site: Site
    special_ids: frozenset[int]
    maxima: list[float]
    firing_rates: list[float]
    row_norms: list[float]

    def __post_init__(self) -> None:
        _KNOWN[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: models are too large to send to the process that ZeroGPU forks, and lie in its memory already."""
        return _again, (self.key,)

    @property
    def prefix_sizes(self) -> list[int]:
        return list(self.sae.config.prefix_sizes)

    def level_of(self, latent: int) -> int:
        """The first level that has the latent."""
        return next(level for level, size in enumerate(self.prefix_sizes) if latent < size)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Tokens as text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def checked(self, latent: int) -> int:
        """The latent; raises SpaceError where the SAE has none of that number."""
        if not 0 <= latent < self.sae.config.num_latents:
            raise SpaceError(f"This SAE has latents 0 to {self.sae.config.num_latents - 1:,}; there is no {latent:,}.")
        return latent


_KNOWN: weakref.WeakValueDictionary[Key, Workbench] = weakref.WeakValueDictionary()


def _again(key: Key) -> Workbench:
    return _KNOWN.get(key) or _reopened(key)


@lru_cache(maxsize=1)
def _reopened(key: Key) -> Workbench:
    """One that was opened after this process was forked."""
    return Library((key.source,)).open(key)


class Library:
    """Opens SAEs and keeps the latest few. `own` are those that the Space offers; others must be Hub repos, so that a
    visitor reads no folder of the machine.
    """

    def __init__(self, own: tuple[str, ...]) -> None:
        self.own = own
        self._open: OrderedDict[Key, Workbench] = OrderedDict()
        self._models: weakref.WeakValueDictionary[tuple[str, str | None], PreTrainedModel]
        self._models = weakref.WeakValueDictionary()
        self._tokenizers: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}
        # Loading takes long, and those whose SAE is open must not wait for it.
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def entries(self, source: str) -> list[SAEEntry]:
        """The SAEs of a repo or folder. Raises SpaceError, or hf_msae's NoSAEError, in words."""
        source = source.strip()
        if source not in self.own:
            try:
                validate_repo_id(source)
            except HFValidationError as error:
                raise SpaceError(
                    f"{source[:100]!r} is not the id of a Hub repo; write owner/name, as in its address."
                ) from error
            if Path(source).exists():
                raise SpaceError("This Space opens Hub repos only; write owner/name.")
        return list_saes(source)

    def open(self, key: Key) -> Workbench:
        """The SAE with its language model, loaded at the first call. Raises SpaceError in words."""
        found = self._find(key)
        if found is not None:
            return found
        with self._loading:
            found = self._find(key) or self._load(key)
            with self._lock:
                self._open[key] = found
                while len(self._open) > NUM_OPEN:
                    self._open.popitem(last=False)
            return found

    def _find(self, key: Key) -> Workbench | None:
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
            return self._open.get(key)

    def _load(self, key: Key) -> Workbench:
        subfolders = [entry.subfolder for entry in self.entries(key.source)]
        if key.subfolder not in subfolders:
            raise SpaceError(f"{key.source} has no SAE {key.subfolder!r}; there are {', '.join(subfolders)}.")
        sae = MatryoshkaSAE.from_pretrained(key.source, subfolder=key.subfolder).eval()
        name = sae.config.base_model
        if name is None or sae.config.site is None:
            raise SpaceError(f"{key.source} does not say which language model it reads, so it cannot be shown.")
        if key.source not in self.own:
            _check_repo(name)
        model, tokenizer = self._language_model(name, sae.config.base_model_revision)
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = frozenset(added | set(tokenizer.all_special_ids))
        site = resolve_site(model, sae.config.site)
        numbers = (sae.max_activation.tolist(), sae.firing_rate.tolist(), sae.W_dec.norm(dim=-1).tolist())
        return Workbench(key, sae.to(model.device, torch.float32), model, tokenizer, site, special, *numbers)

    def _language_model(self, name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        found = self._models.get((name, revision))
        if found is not None:
            return found, self._tokenizers[name, revision]
        if name == STORIES:
            model, tokenizer = load_story_lm()
        else:
            model, tokenizer = _from_hub(name, revision)
        model = model.to(_device(name)).eval()  # type: ignore[arg-type]
        self._models[name, revision], self._tokenizers[name, revision] = model, tokenizer
        return model, tokenizer


def _device(name: str) -> str:
    # The story model needs no GPU, and is read from threads, to which ZeroGPU lends none.
    lent = find_zerogpu() is not None and name == STORIES
    return "cuda" if torch.cuda.is_available() and not lent else "cpu"


def short(source: str) -> str:
    """A folder by its own name; a repo as it is."""
    return Path(source).name if Path(source).is_dir() else source


def _from_hub(name: str, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # The name comes out of somebody's configuration: its code is never run.
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        _check_memory(name, config, dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **hub)
        return model, AutoTokenizer.from_pretrained(name, **hub)
    except SpaceError:
        raise
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise SpaceError(
            f"The language model {name!r} of this SAE cannot be loaded here: {_first_line(error)} (A gated model "
            "needs the Space's owner to accept its licence and to set the secret HF_TOKEN; models with code of their "
            "own are not run.)"
        ) from error


def _check_repo(name: str) -> None:
    """Refuses folders of this machine, which somebody else's SAE has no business to name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SpaceError(f"This SAE reads the language model {name!r}, which is not the id of a Hub repo.") from error
    if name != STORIES and Path(name).exists():
        raise SpaceError(f"This SAE reads the language model {name!r}, which is a folder, not a Hub repo.")


def _check_memory(name: str, config: Any, dtype: torch.dtype) -> None:
    """Refuses a model that cannot fit before its weights are fetched."""
    with torch.device("meta"):
        number = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    if torch.cuda.is_available() and find_zerogpu() is None:
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = number * dtype.itemsize + SPARE_BYTES
    if needed > there:
        raise SpaceError(
            f"{name} has {number / 1e9:.1f} billion parameters and needs about {needed / 2**30:.0f} GiB here; this "
            f"machine has {there / 2**30:.0f}. Duplicate the Space on larger hardware, or choose an SAE of a smaller "
            "model."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The SAEs that are open, each with its language model.

Each is loaded once and shared by all who look at it, and as many are kept as the machine's memory has room for.
"""

import copyreg
import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae import MatryoshkaSAE, SAEEntry, list_saes
from hf_msae.hub.index import NoSAEError
from hf_msae.language_models import count_parameters, load_language_model, load_language_model_config, model_of
from hf_msae.sites import SiteError, resolve_site
from hf_msae.special_tokens import special_token_ids
from hf_msae.worlds.stories import STORIES
from msae_space.loaded_sae import Key, Language, LoadedSAE, SpaceError, first_line, sae_bytes
from msae_space.memory import machine_bytes
from msae_space.smoke_test import smoke_test
from msae_space.zerogpu import find_zerogpu

# Room for activations and caches, and for what a file takes while it is read.
SPARE_BYTES = 2 * 2**30
BUSY = "Others are using what is open here, and there is no room beside it. Try again in a minute."

_KNOWN: weakref.WeakValueDictionary[Key, LoadedSAE] = weakref.WeakValueDictionary()


def _again(key: Key) -> LoadedSAE:
    return _KNOWN.get(key) or _reopened(key)


@lru_cache(maxsize=1)
def _reopened(key: Key) -> LoadedSAE:
    """One that was opened after this process was forked, and tried there."""
    return Library((key.source,)).load(key)


# By name: models are too large to send to the process that ZeroGPU forks, and lie in its memory already.
copyreg.pickle(LoadedSAE, lambda loaded: (_again, (loaded.key,)))


class Companion(Protocol):
    """What belongs to an open SAE, and is closed with it."""

    def __init__(self, loaded: LoadedSAE) -> None: ...

    @property
    def is_working(self) -> bool:
        """Whether it needs the SAE now, in the background."""


Kind = TypeVar("Kind", bound=Companion)


@dataclass(eq=False)
class _Opened:
    """A workbench, who has it now, and what goes with it."""

    loaded: LoadedSAE
    loans: "weakref.WeakSet[LoadedSAE]" = field(default_factory=weakref.WeakSet)
    companion: "Companion | None" = None

    @property
    def is_used(self) -> bool:
        return len(self.loans) > 0 or (self.companion is not None and self.companion.is_working)


class Library:
    """Opens SAEs, and keeps them as long as there is room.

    Args:
        own: What the Space offers. Others must be Hub repos, so that a visitor reads no folder of the machine.
        budget: Bytes for all that is open; by default the machine's memory but for SPARE_BYTES. Where there is no room
            for another SAE, those that nobody has asked for the longest are closed; what somebody uses is never.
    """

    def __init__(self, own: tuple[str, ...], budget: int | None = None) -> None:
        self.own = own
        self.budget = machine_bytes() - SPARE_BYTES if budget is None else budget
        self._open: OrderedDict[Key, _Opened] = OrderedDict()
        self._languages: weakref.WeakValueDictionary[tuple[str, str | None], Language] = weakref.WeakValueDictionary()
        # Loading takes long, and those whose SAE is open must not wait for it.
        self._lock, self._loading = threading.RLock(), threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of all that is open."""
        with self._lock:
            all_loaded = [one.loaded for one in self._open.values()]
        languages = {id(loaded.language): loaded.language.num_bytes for loaded in all_loaded}
        return sum(loaded.num_bytes for loaded in all_loaded) + sum(languages.values())

    def entries(self, source: str) -> list[SAEEntry]:
        """The SAEs of a repo or folder.

        Raises:
            SpaceError: It is no Hub repo and not the Space's own, or cannot be read.
            NoSAEError: There is no such repo, or no SAE in it.
        """
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
        return _read(source, lambda: list_saes(source))

    def open(self, key: Key) -> LoadedSAE:
        """The SAE with its language model, loaded at the first call.

        It stays open as long as somebody holds what is returned.

        Raises:
            SpaceError: It cannot be read or worked with, or there is no room for it.
            NoSAEError: There is no such repo, or no SAE in it.
        """
        found = self._lent(key)
        if found is not None:
            return found
        with self._loading:
            found = self._lent(key)
            if found is not None:
                return found
            loaded = _KNOWN[key] = self.load(key)
            loaded = _KNOWN[key] = replace(loaded, mean_norm=smoke_test(loaded))
            with self._lock:
                self._open[key] = _Opened(loaded)
                found = self._lent(key)
            if found is None or not self._make_room(0):  # its index may have said less than there is
                self._close(key)
                raise SpaceError(f"The SAE {key.source} needs about {_size(loaded.num_bytes)}. {BUSY}")
            return found

    def companion(self, loaded: LoadedSAE, kind: type[Kind]) -> Kind:
        """What belongs to an SAE that `open` gave: an object of the kind, made at the first call."""
        with self._lock:
            opened = self._open[loaded.key]
            if not isinstance(opened.companion, kind):
                # Of what is kept here rather than of a loan, which would count as use for ever.
                opened.companion = kind(opened.loaded)
            return opened.companion

    def _lent(self, key: Key) -> LoadedSAE | None:
        with self._lock:
            if key not in self._open:
                return None
            self._open.move_to_end(key)
            loan = replace(self._open[key].loaded)
            self._open[key].loans.add(loan)
            return loan

    def _make_room(self, needed: int) -> bool:
        """Closes what nobody uses, the longest unasked for first, until so many bytes are free; whether they are."""
        if self.num_bytes + needed <= self.budget:
            return True
        # Whoever is done may still be held by a cycle of Python's.
        gc.collect()
        with self._lock:
            for key in [key for key, opened in self._open.items() if not opened.is_used]:
                if self.num_bytes + needed <= self.budget:
                    break
                self._close(key)
        gc.collect()
        return self.num_bytes + needed <= self.budget

    def _close(self, key: Key) -> None:
        with self._lock:
            self._open.pop(key, None)

    def load(self, key: Key) -> LoadedSAE:
        """The SAE and its language model as their files have them, not tried yet; raises as `open` does."""
        entries = {entry.subfolder: entry for entry in self.entries(key.source)}
        if key.subfolder not in entries:
            raise SpaceError(f"{key.source} has no SAE {key.subfolder[:100]!r}; there are {', '.join(entries)[:500]}.")
        entry = entries[key.subfolder]
        needed = sae_bytes(2 * 4 * entry.num_latents * entry.hidden_size, entry.num_latents)
        self._check_room(f"The SAE {key.source}", needed)
        sae = _read(
            key.source, lambda: MatryoshkaSAE.from_pretrained(key.source, subfolder=key.subfolder).eval().float()
        )
        name, revision = model_of(sae.config)
        if name is None or sae.config.site is None:
            raise SpaceError(f"{key.source} does not say which language model it reads, so it cannot be shown.")
        if sae.config.is_transcoder:
            raise SpaceError(
                f"{key.source} is a transcoder, which reconstructs another place than it reads; this page shows SAEs. "
                "hf-msae steer and hf-msae interpret take it."
            )
        if sae.config.is_tokenized:
            raise SpaceError(
                f"{key.source} is tokenized: a vector of each token is a part of what it reconstructs, which this "
                "page does not show. hf-msae steer and hf-msae interpret take it."
            )
        if key.source not in self.own:
            _check_repo(name)
        return _loaded_sae(key, sae, self._language(name, revision, needed))

    def _check_room(self, what: str, needed: int) -> None:
        """Before anything so large is read. Raises SpaceError where it has no room."""
        if needed > self.budget:
            raise SpaceError(
                f"{what} needs about {_size(needed + SPARE_BYTES)} here; this machine has "
                f"{_size(self.budget + SPARE_BYTES)}. Duplicate the Space on larger hardware, or choose a smaller one."
            )
        if not self._make_room(needed):
            raise SpaceError(f"{what} needs about {_size(needed)}. {BUSY}")

    def _language(self, name: str, revision: str | None, beside: int) -> Language:
        """The language model; `beside` bytes are taken by the SAE that reads it."""
        found = self._languages.get((name, revision))
        if found is not None:
            return found
        model, tokenizer = self._load_language(name, revision, beside)
        found = Language.of(model.to(_device(name)), tokenizer)  # type: ignore[arg-type]
        self._languages[name, revision] = found
        return found

    def _load_language(
        self, name: str, revision: str | None, beside: int
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        # The name comes out of somebody's configuration: its code is never run.
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        dtype = torch.bfloat16 if torch.cuda.is_available() and name != STORIES else torch.float32
        try:
            number = count_parameters(name, load_language_model_config(name, **hub))
            self._check_room(f"{name} has {number / 1e9:.1f} billion parameters and", number * dtype.itemsize + beside)
            return load_language_model(name, dtype=dtype, needs_head=True, **hub)
        except SpaceError:
            raise
        except Exception as error:  # the files are anybody's, and so is what they make of a reader
            raise SpaceError(
                f"The language model {name!r} of this SAE cannot be loaded here: {first_line(error)} (A gated model "
                "needs the Space's owner to accept its licence and to set the secret HF_TOKEN; models with code of "
                "their own are not run.)"
            ) from error


def _loaded_sae(key: Key, sae: MatryoshkaSAE, language: Language) -> LoadedSAE:
    special = special_token_ids(language.tokenizer)
    try:
        site = resolve_site(language.model, str(sae.config.site))
    except SiteError as error:
        raise SpaceError(f"{key.source} cannot be shown: {error}") from error
    numbers = (sae.max_activation.tolist(), sae.firing_rate.tolist(), sae.W_dec.norm(dim=-1).tolist())
    return LoadedSAE(key, sae.to(language.model.device), language, site, special, *numbers, mean_norm=1.0)


Result = TypeVar("Result")


def _read(source: str, reading: Callable[[], Result]) -> Result:
    """What somebody's files hold; whatever is wrong with them is told in words."""
    try:
        return reading()
    except NoSAEError:
        raise
    except Exception as error:  # the files are anybody's, and so is what they make of a reader
        raise SpaceError(
            f"{source} cannot be read: {first_line(error)} Choose another, or have its owner publish it again."
        ) from error


def _device(name: str) -> str:
    # The story model needs no GPU, and is read from threads, to which ZeroGPU lends none.
    lent = find_zerogpu() is not None and name == STORIES
    return "cuda" if torch.cuda.is_available() and not lent else "cpu"


def short(source: str) -> str:
    """A folder by its own name; a repo as it is."""
    return Path(source).name if Path(source).is_dir() else source


def _check_repo(name: str) -> None:
    """Refuses folders of this machine, which somebody else's SAE has no business to name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SpaceError(f"This SAE reads the language model {name!r}, which is not the id of a Hub repo.") from error
    if name != STORIES and Path(name).exists():
        raise SpaceError(f"This SAE reads the language model {name!r}, which is a folder, not a Hub repo.")


def _size(number: int) -> str:
    size = number / 2**30
    return f"{size:,.0f} GiB" if size >= 10 else f"{size:.2g} GiB"

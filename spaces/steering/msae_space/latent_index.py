"""Names, search, pages and hierarchy of an open SAE's latents: made once in the background, then only looked up.

Where a folder or repo has an interpretation beside the SAE (`hf-msae interpret` makes one), it is loaded; for the
story world one is made here, and kept in the user's cache. Without any, latents have only their numbers.

The pass that makes one, and a search, get modules of their own that share the weights, so that neither meets the hooks
of the other, or of visitors who generate.
"""

import hashlib
import logging
import re
import shutil
import threading
import time
from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_msae.hub import cache_folder
from hf_msae.interpret.hierarchy import Edge
from hf_msae.interpret.pages import Context, LatentPage
from hf_msae.interpret.pipeline import interpret
from hf_msae.interpret.search import FiringHit, search_firing, search_labels, search_promoting
from hf_msae.interpret.store import Interpretation, InterpretationError
from hf_msae.worlds.stories import STORIES, StoryWorld
from msae_space import validation
from msae_space.loaded_sae import LoadedSAE, SpaceError, first_line, own_modules
from msae_space.presets import Preset, by_promotion, published, words_of
from msae_space.reading import MAX_PHRASE_TOKENS, encode_text
from msae_space.trials import presets_by_trial
from msae_space.zerogpu import find_zerogpu, on_gpu

logger = logging.getLogger(__name__)

NUM_STORIES, NUM_TOKENS = 2_000, 100_000
# Part of the file's name, so that presets found another way are not taken for these.
PRESETS_VERSION = 1
NUM_HITS, NUM_RELATIVES = 6, 10
READING = "Reading text to find out what the latents mean. Names, search and the tree come when that is done."
TRYING = "Trying out which latents steer best. Presets come in a moment."
NONE = "There is no interpretation beside this SAE, so its latents have only numbers. `hf-msae interpret` makes one."
FAILED = "Finding out about the latents failed here: {} Reload the page to try again; steering works all the same."
# A background task is tried so often by itself, and again for a visitor who comes after so many seconds.
NUM_TRIES, REST_SECONDS, THREAD_NAME = 2, 30.0, "what latents mean"
# What is found out by running the model over text takes all cores, so one SAE's waits for another's.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Hit:
    """A latent that was found.

    Args:
        latent: Its number.
        why: What it was found for, in words.
        promotes: It was found for what it makes likelier, rather than for where it fires.
    """

    latent: int
    why: str
    promotes: bool = False


class LatentIndex:
    """Names, search, pages and the hierarchy of one SAE's latents, which come in the background; safe to share.

    Args:
        loaded: The SAE.

    Attributes:
        progress: What is to be said to visitors while something is missing; empty when all is known.
    """

    def __init__(self, loaded: LoadedSAE) -> None:
        self.loaded = loaded
        self.progress = READING
        self._found: Interpretation | None = None
        self._presets: list[Preset] = []
        self._names: list[str] = []
        self._promoted: list[str] = []
        self._model, self._searched = (own_modules(loaded.language.untouched) for _ in range(2))
        self._searching, self._starting = threading.Lock(), threading.Lock()
        self._failed, self._ended = False, 0.0
        self._thread = self._started()

    def wait(self) -> None:
        """Until all is known that will be."""
        self._thread.join()

    def try_again(self) -> None:
        """Begins anew where finding out has failed, and that not just now."""
        with self._starting:
            if self._failed and not self.is_working and time.monotonic() - self._ended > REST_SECONDS:
                self.progress = READING
                self._thread = self._started()

    @property
    def is_working(self) -> bool:
        """Whether the SAE is being read in the background."""
        return self._thread.is_alive()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._learn, name=THREAD_NAME, daemon=True)
        thread.start()
        return thread

    def _learn(self) -> None:
        for left in reversed(range(NUM_TRIES)):
            try:
                self._failed = False
                self.progress = self._found_out()
                return
            except Exception as error:  # a thread's exception would reach nobody
                logger.exception("The latents of %s could not be interpreted.", self.loaded.key)
                self._failed, self._ended = True, time.monotonic()
                if not left:
                    self.progress = FAILED.format(first_line(error))

    def _found_out(self) -> str:
        """Finds out what is not known yet; what is to be said when that is done."""
        self._presets = published(self.loaded)
        if self._found is None:
            found = _load(self.loaded) or _make(self.loaded, self._model)
            if found is None:
                return NONE
            if len(found) != self.loaded.sae.config.num_latents:
                raise InterpretationError(
                    f"The interpretation beside this SAE has {len(found):,} latents, and the SAE has "
                    f"{self.loaded.sae.config.num_latents:,}."
                )
            names, promoted = found.names, [", ".join(words_of(one)) for one in found.column("promoted")]
            self._names, self._promoted, self._found = names, promoted, found
        self.progress = TRYING
        self._presets = self._presets or self._find_presets(self._found)
        return ""

    def _find_presets(self, found: Interpretation) -> list[Preset]:
        if self.loaded.sae.config.base_model != STORIES:
            return by_promotion(self.loaded, found)
        path = cache_folder() / "presets" / f"{_fingerprint(self.loaded)}-v{PRESETS_VERSION}.json"
        with _ONE_AT_A_TIME:
            return presets_by_trial(self.loaded, self._model, found, path) or by_promotion(self.loaded, found)

    @property
    def is_learning(self) -> bool:
        """Whether more will be known soon."""
        return self.progress in (READING, TRYING)

    @property
    def has_pages(self) -> bool:
        """Whether names, pages and the tree are there."""
        return self._found is not None

    # Names

    def name(self, latent: int) -> str:
        """A few words for a latent; they are a hint, not a definition."""
        return self._names[latent] if self._names else "(not named)"

    def promoted(self, latent: int) -> str:
        """The words that a latent makes likelier, as far as they are known; they say better what steering does."""
        return self._promoted[latent] if self._promoted else ""

    def number(self, words: str) -> int:
        """The latent that a visitor typed.

        Raises:
            SpaceError: It is no latent of this SAE.
        """
        latent = validation.decimal(words.strip().lstrip("#").replace(",", ""))
        if latent is None:
            raise SpaceError(f"{words.strip()[:40]!r} is not the number of a latent; type one such as 12.")
        return self.loaded.checked(latent)

    # Search

    def search(self, words: str) -> list[Hit]:
        """Latents by their number, or by a word or phrase.

        Those that promote the word come first, for they steer, and then those that fire on the phrase more than usual
        or have it in their label.

        Raises:
            SpaceError: The number is no latent's, or the words cannot be looked for.
        """
        words = validation.words(words, "The search", validation.MAX_WORDS).strip()
        if not words:
            raise SpaceError("Type a word, a phrase, or the number of a latent.")
        if re.fullmatch(r"#?[\d,]+", words):
            return [Hit(self.number(words), "this number")]
        if self._found is None:
            raise SpaceError(f"Latents can only be found by their numbers now. {self.progress}")
        encode_text(self.loaded, words, "The search", MAX_PHRASE_TOKENS)
        try:
            return [*self._promoting(words, self._found), *self._firing(words, self._found)]
        except ValueError as error:
            raise SpaceError(str(error)) from error

    def _promoting(self, words: str, found: Interpretation) -> list[Hit]:
        maxima = self.loaded.maxima
        hits = search_promoting(words, found, most=len(found))
        # What counts is how much a latent can do, so effects are taken at its maximum.
        order = sorted(hits, key=lambda hit: -hit.effect * maxima[hit.latent])[:NUM_HITS]
        return [
            Hit(hit.latent, f"“{hit.token.strip()}” {hit.effect * maxima[hit.latent]:+.1f}", True) for hit in order
        ]

    def _firing(self, words: str, found: Interpretation) -> list[Hit]:
        reasons: dict[int, list[str]] = {}
        for labelled in search_labels(words, found, most=NUM_HITS):
            reasons.setdefault(labelled.latent, []).append("label")
        phrase = f" {words}"  # as it stands inside a text; most tokenizers write a word at the beginning differently
        if find_zerogpu() is None:
            with self._searching:
                firing = _fires(self.loaded, self._searched, phrase, found)
        else:
            firing = _fires_lent(self.loaded, phrase, found)
        for hit in firing:
            reasons.setdefault(hit.latent, []).append(f"“{hit.token.strip()}” {100 * hit.relative:.0f}%")
        order = sorted(reasons, key=lambda latent: -len(reasons[latent]))
        return [Hit(latent, ", ".join(reasons[latent])) for latent in order[:NUM_HITS]]

    # Pages

    def page(self, latent: int) -> LatentPage | None:
        """All that is known of a latent; None where nothing is, yet.

        Raises:
            SpaceError: The SAE has no such latent.
        """
        self.loaded.checked(latent)
        return None if self._found is None else self._found.page(latent)

    # Hierarchy

    def roots(self) -> list[Hit]:
        """Latents with children and without parents, the easiest to understand first."""
        if self._found is None or self._found.hierarchy is None:
            return []
        tree = self._found.hierarchy
        below = tree.descendants()
        wide = set(tree.super_parents)
        return [
            Hit(latent, f"{len(below[latent])} below" + (", suspiciously many" if latent in wide else ""))
            for latent in tree.roots(self._found.names)
        ]

    def parents(self, latent: int) -> list[Hit]:
        """More general latents, and how much of their firings this one makes up."""
        page = self.page(latent)
        return [Hit(edge.parent, self._why(edge)) for edge in page.parents[:NUM_RELATIVES]] if page else []

    def children(self, latent: int) -> list[Hit]:
        """More specific latents, those that make up most of this one's firings first."""
        page = self.page(latent)
        return [Hit(edge.child, self._why(edge)) for edge in page.children[:NUM_RELATIVES]] if page else []

    def _why(self, edge: Edge) -> str:
        """How much of the parent an edge of what is known makes up, and how sure it is."""
        if self._found is None or self._found.hierarchy is None:
            raise ValueError("An edge was given, and there is no hierarchy.")
        return f"{self._found.hierarchy.share(edge):.0%} · sure {edge.score:.2f}"

    # Presets

    def presets(self) -> list[Preset]:
        """What to try first."""
        return self._presets

    def tried(self, latent: int) -> Preset | None:
        """The preset that turns up this latent alone, where it was tried out and its words are known to follow."""
        alone = (preset for preset in self._presets if [dial.latent for dial in preset.dials] == [latent])
        return next((preset for preset in alone if preset.prompt is not None), None)


def strengths(context: Context, maximum: float) -> list[float]:
    """The activations of a context as shares of the latent's maximum."""
    return [value / maximum if maximum > 0 else 0.0 for value in context.activations]


def _fires(loaded: LoadedSAE, model: PreTrainedModel, phrase: str, found: Interpretation) -> list[FiringHit]:
    return search_firing(phrase, model, loaded.tokenizer, loaded.sae, found, most=NUM_HITS)


@on_gpu
def _fires_lent(loaded: LoadedSAE, phrase: str, found: Interpretation) -> list[FiringHit]:
    """In a process of its own, whose model nobody else uses."""
    return _fires(loaded, loaded.model, phrase, found)


def _load(loaded: LoadedSAE) -> Interpretation | None:
    try:
        return Interpretation.load(loaded.key.source, subfolder=loaded.key.subfolder or None)
    except InterpretationError as error:
        logger.info("%s", error)
        return None


def _make(loaded: LoadedSAE, model: PreTrainedModel) -> Interpretation | None:
    """Of the story world, whose text is here; None for other models."""
    if loaded.sae.config.base_model != STORIES:
        return None
    folder = cache_folder() / "interpretations" / _fingerprint(loaded)
    with _ONE_AT_A_TIME:
        if folder.is_dir():
            try:
                return Interpretation(folder)
            except ValueError:  # written by another version of hf_msae
                shutil.rmtree(folder)
        stories = StoryWorld(seed=1).documents(NUM_STORIES)
        return interpret(model, loaded.tokenizer, loaded.sae, stories, folder, max_tokens=NUM_TOKENS)


def _fingerprint(loaded: LoadedSAE) -> str:
    """Tells one SAE's weights from another's."""
    digest = hashlib.sha256()
    for tensor in loaded.sae.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

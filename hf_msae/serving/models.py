"""What is served: a language model, the SAEs that read it, and the steerings that are saved beside them."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.devices import move_language_model
from hf_msae.errors import InputError
from hf_msae.hub.index import list_saes
from hf_msae.language_models import load_language_model, model_to_load
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.untrusted import inside
from hf_msae.quantization import quantization_to_load
from hf_msae.sites import find_output_site, find_site
from hf_msae.steering import SteeredPipeline, Steering, load_steerings
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.saved import STEERING_NAME

# Names of a configuration's setting that says how many tokens the model can read.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
LanguageModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Served:
    """A language model with SAEs, under the name by which requests ask for it.

    Args:
        name: The name; with ":" and a steering's behind it, that steering is used.
        pipe: The models, without steering.
        steerings: What is saved, by name.
        tokenizing: Held while texts are made into tokens, because a tokenizer does not bear two threads.

    Raises:
        SiteError: An SAE does not fit the language model.
    """

    name: str
    pipe: SteeredPipeline
    steerings: Mapping[str, Steering] = field(default_factory=dict)
    tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, sae in self.pipe.saes.items():
            site = find_site(self.pipe.model, sae.config, called=name)
            find_output_site(self.pipe.model, sae.config, site, called=name)

    @property
    def names(self) -> list[str]:
        """The names that a request's `model` may have."""
        return [self.name, *(f"{self.name}:{steering}" for steering in self.steerings)]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        tokenizer = self.pipe.tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def context_length(self) -> int | None:
        """How many tokens the language model can read, prompt and answer; None where it does not say."""
        config = self.pipe.model.config.get_text_config().to_dict()
        return next((config[name] for name in POSITIONS if config.get(name)), None)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        ids = self.pipe.model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])


def load_served(
    source: str | Path,
    *,
    subfolder: str = "",
    model: str | None = None,
    name: str | None = None,
    loaded: dict[tuple[str, str | None], LanguageModel] | None = None,
) -> Served:
    """Load SAEs with their language model and their saved steerings.

    Args:
        source: A folder or a Hub repo with an SAE, or with several of one language model in folders of their own;
            edits then name the folder.
        subfolder: The SAE's folder where only one of several is served.
        model: The language model; by default the one that the SAE was trained on.
        name: By which requests ask for it; by default the folder's name or the repo's.
        loaded: Language models that were loaded for other SAEs, which are used again; those loaded here are added.

    Returns:
        The models, on this process's device.

    Raises:
        InputError: There is no such SAE or language model, or the SAEs are of several language models.
        SiteError: An SAE does not fit the language model.
    """
    folders = [subfolder] if subfolder else [entry.subfolder for entry in list_saes(source)]
    saes = {
        "" if subfolder else folder: MatryoshkaSAE.from_pretrained(source, subfolder=folder).eval()
        for folder in folders
    }
    language_model = _language_model(saes, str(source), model, {} if loaded is None else loaded)
    device = language_model[0].device
    pipe = SteeredPipeline(*language_model, {key: sae.to(device) for key, sae in saes.items()}, Steering())
    local = Path(source).is_dir()
    return Served(
        name=name or (Path(source).resolve().name if local else str(source)),
        pipe=pipe,
        steerings=_saved_steerings(source, subfolder),
    )


def _language_model(
    saes: Mapping[str, MatryoshkaSAE],
    source: str,
    model: str | None,
    loaded: dict[tuple[str, str | None], LanguageModel],
) -> LanguageModel:
    names = {model_to_load(sae.config, source, model) for sae in saes.values()}
    if len(names) > 1:
        shown = ", ".join(sorted(name for name, _ in names))
        raise InputError(f"{source} has SAEs of several language models ({shown}); name one's folder with subfolder.")
    name, revision = next(iter(names))
    if (name, revision) not in loaded:
        quantization = None if model else quantization_to_load(next(iter(saes.values())).config)
        language_model, tokenizer = load_language_model(
            name, revision=revision, needs_head=True, quantization=quantization
        )
        move_language_model(language_model, PartialState().device)  # type: ignore[arg-type]
        loaded[name, revision] = language_model, tokenizer
    return loaded[name, revision]


def _saved_steerings(source: str | Path, subfolder: str) -> dict[str, Steering]:
    """What is saved beside the SAE; nothing where there is no such file."""
    if Path(source).is_dir() and not (Path(source) / inside(subfolder) / STEERING_NAME).is_file():
        return {}
    try:
        return load_steerings(source, subfolder=subfolder)
    except SteeringError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return {}
        raise


def by_name(served: Sequence[Served]) -> dict[str, tuple[Served, Steering]]:
    """What each name that a request may ask for means: the models, and the steering without another one.

    Raises:
        InputError: Nothing is served, or a name stands for two.
    """
    found: dict[str, tuple[Served, Steering]] = {}
    for one in served:
        for name in one.names:
            if name in found:
                raise InputError(f"two of the models to serve are called {name!r}; give one another name.")
            found[name] = one, one.steerings.get(name.removeprefix(f"{one.name}:"), Steering())
    if not found:
        raise InputError("there is no model to serve; name at least one SAE.")
    return found

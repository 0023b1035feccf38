"""Activations of text that says which concepts it expresses: the truth that concept metrics are judged against.

Two sources. Story texts, where every word expresses a path of concepts (owl, bird, animal); an example is a token,
the last one of its word, because that is where a language model knows the whole word. They are English text that any
model's tokenizer can read, so they serve models other than the story model too, whose probes then say how well. And
documents with one label each; an example is then a document, and its features are means over its tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import Window
from hf_msae.data.sources import UnreadableRow
from hf_msae.data.windows import DocumentEncoder, pad_id, vocabulary
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import run_model, tokens_at_once
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import within_limit
from hf_msae.sites import Site
from hf_msae.worlds.stories import CONCEPTS, StoryWorld, ancestors, concept_spans

# Stories that neither the story model (seed 0, checked on seed 1) nor an SAE trained by default (seed 0) has seen.
STORY_SEED = 2
MIN_EXAMPLES = 40
STORY_FACTS = ("female", "male", "outdoor_place", "indoor_place", "fine_weather", "wet_weather", "cold_weather")

Encoder = Callable[[Tensor], Tensor]
"""Features (n, width) of activations (n, hidden_size)."""


@dataclass
class LabelledActivations:
    """Examples with labels.

    Args:
        x: activations, (num_tokens, hidden_size).
        labels: (num_examples, num_concepts) bool.
        names: of the concepts.
        document_of: the document of each example, (num_examples,) int64.
        description: of the examples, for people.
        parents: the parent of each concept that has one among the names.
        example_of: the example of each token, (num_tokens,) int64, where examples are documents; None where each token
            is an example.
    """

    x: Tensor
    labels: Tensor
    names: Sequence[str]
    document_of: Tensor
    description: str
    parents: Mapping[str, str] = field(default_factory=dict)
    example_of: Tensor | None = None

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @property
    def num_concepts(self) -> int:
        """The number of concepts."""
        return len(self.names)

    def children(self, name: str) -> list[str]:
        """The concepts right under one.

        Args:
            name: of the concept.
        """
        return [child for child in self.names if self.parents.get(child) == name]

    @cached_property
    def raw(self) -> Tensor:
        """The examples' activations themselves, (num_examples, hidden_size)."""
        return self._pooled(self.x)

    @torch.inference_mode()
    def features(self, encode: Encoder, at_once: int, columns: Tensor | None = None) -> Tensor:
        """Features of all examples; a document's are the means over its tokens.

        Args:
            encode: gives features of activations.
            at_once: tokens to encode together.
            columns: which features to keep; by default all.

        Returns:
            (num_examples, width) float32 on the CPU.
        """
        parts = []
        for part in self.x.split(at_once):
            encoded = encode(part)
            parts.append((encoded if columns is None else encoded[:, columns.to(encoded.device)]).float().cpu())
        return self._pooled(torch.cat(parts))

    @torch.inference_mode()
    def class_means(self, encode: Encoder, at_once: int, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features of examples with each concept and of those with others only.

        Features of wide dictionaries are never all in memory.

        Args:
            encode: gives features of activations.
            at_once: tokens to encode together.
            examples: which examples count, (num_examples,) bool.

        Returns:
            With the concept and without it, (num_concepts, width) float64 each.
        """
        labelled = self.labels.any(1) & examples
        has = (self.labels & labelled[:, None]).double()
        lacks = (~self.labels & labelled[:, None]).double()
        of_token = torch.arange(self.num_examples) if self.example_of is None else self.example_of
        share = 1.0 / torch.bincount(of_token, minlength=self.num_examples).clamp_min(1).double()
        sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
        for part, rows in zip(self.x.split(at_once), of_token.split(at_once), strict=True):
            features = encode(part).float().cpu()
            for side, member in enumerate((has, lacks)):
                sums[side] = sums[side] + (member[rows] * share[rows, None]).T.float() @ features
        counts = [member.sum(0).clamp_min(1)[:, None] for member in (has, lacks)]
        return sums[0] / counts[0], sums[1] / counts[1]

    @torch.inference_mode()
    def features_of(self, encode: Encoder, examples: Tensor) -> Tensor:
        """All features of a few examples.

        Args:
            encode: gives features of activations.
            examples: their numbers, (n,) int64.

        Returns:
            (n, width) float32 on the CPU.
        """
        if self.example_of is None:
            return encode(self.x[examples]).float().cpu()
        found = []
        for example in examples.tolist():
            found.append(encode(self.x[self.example_of == example]).float().mean(0).cpu())
        return torch.stack(found)

    def _pooled(self, features: Tensor) -> Tensor:
        if self.example_of is None:
            return features
        sums = torch.zeros(self.num_examples, features.shape[1]).index_add_(0, self.example_of, features)
        return sums / torch.bincount(self.example_of, minlength=self.num_examples).clamp_min(1)[:, None]


def encoder_of(sae: MatryoshkaSAE) -> tuple[Encoder, int]:
    """An SAE's latents as features, and how many tokens to encode at once.

    Args:
        sae: in evaluation mode.
    """
    return lambda x: sae.encode(x.to(sae.device)), tokens_at_once(sae)


def story_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    site: Site,
    *,
    num_stories: int,
    context_length: int,
    lm_batch_size: int = 16,
    seed: int = STORY_SEED,
    norm_limit: float | None = None,
) -> tuple[LabelledActivations, LabelledActivations]:
    """Tokens with their concepts, and the same stories as documents with what happens in them.

    The second has a label for each sex of the hero, side of the house and kind of weather: facts of a whole story that
    are independent of each other. Concepts with fewer than `MIN_EXAMPLES` tokens are left out.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        site: where in it.
        num_stories: how many stories.
        context_length: tokens of a story that are read.
        lm_batch_size: stories per forward pass.
        seed: of the stories.
        norm_limit: tokens whose activation's norm is beyond it are left out; None or 0 for no limit.

    Returns:
        Tokens as examples, and documents as examples.

    Raises:
        InputError: the tokenizer is a slow one, which knows no offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"Labels of words need a fast tokenizer, which knows offsets; {type(tokenizer).__name__} is not. Give "
            "--labelled with a file of labelled documents instead."
        )
    world = StoryWorld(seed)
    stories = [world.story(index) for index in range(num_stories)]
    encoder = DocumentEncoder(tokenizer)
    windows: list[Window] = []
    names_of: list[tuple[str, ...] | None] = []  # of each token that counts; None: inside a word
    for story in stories:
        ids = encoder.encode([story.text])[0]
        words = _word_ends(story.text, tokenizer)
        words = [()] * (len(ids) - len(words)) + words  # a BOS that was put in front
        windows.append(encoder.window(ids[:context_length]))
        names_of += [word for word, keep in zip(words, windows[-1].keep.tolist(), strict=False) if keep]
    x = run_model(model, site, windows, pad_id(tokenizer, vocabulary(model)), lm_batch_size, "Labelled stories")
    document_of = torch.repeat_interleave(torch.tensor([int(window.keep.sum()) for window in windows]))
    inlying = within_limit(x, norm_limit)
    x, document_of = x[inlying], document_of[inlying]
    names_of = [names for names, kept in zip(names_of, inlying.tolist(), strict=True) if kept]
    facts = [_facts(story.facts) for story in stories]
    return (
        _token_examples(x, names_of, document_of, f"{num_stories:,} stories, words labelled by the grammar"),
        _document_examples(x, facts, document_of, f"{num_stories:,} stories, labelled by what happens in them"),
    )


def _word_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, ...] | None]:
    """For each token the concepts of the word that ends in it.

    () where it is no word with concepts, None where it is an earlier part of one.
    """
    found: list[tuple[str, ...] | None] = []
    spans = iter(concept_spans(text))
    span = next(spans, None)
    for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
        while span is not None and span[1] <= start:
            span = next(spans, None)
        if span is None or end <= span[0] or end == start:
            found.append(())
        else:
            found.append(span[2] if end >= span[1] else None)
    return found


def _facts(facts: Mapping[str, str]) -> tuple[str, ...]:
    """What a story's slots say of its hero, its place and its weather."""
    above = {name for fact in (facts["hero"], facts["place"]) for name in ancestors(fact)}
    above.update(ancestors(facts["weather"]) if "weather" in facts else ())
    return tuple(name for name in STORY_FACTS if name in above)


def _token_examples(
    x: Tensor, names_of: Sequence[tuple[str, ...] | None], document_of: Tensor, description: str
) -> LabelledActivations:
    usable = torch.tensor([names is not None for names in names_of])
    labels, names = _label_matrix([names for names in names_of if names is not None], list(CONCEPTS))
    kept = set(names)
    parents = {name: parent for name in names if (parent := CONCEPTS[name].parent) in kept and parent is not None}
    return LabelledActivations(x[usable], labels, names, document_of[usable], description, parents)


def _document_examples(
    x: Tensor, names_of: Sequence[tuple[str, ...]], document_of: Tensor, description: str
) -> LabelledActivations:
    order = list(dict.fromkeys(name for names in names_of for name in names))
    labels, names = _label_matrix(names_of, order)
    documents = torch.arange(len(names_of))
    return LabelledActivations(x, labels, names, documents, description, example_of=document_of)


def _label_matrix(names_of: Sequence[tuple[str, ...]], order: Sequence[str]) -> tuple[Tensor, list[str]]:
    index = {name: column for column, name in enumerate(order)}
    labels = torch.zeros(len(names_of), len(order), dtype=torch.bool)
    for row, names in enumerate(names_of):
        labels[row, [index[name] for name in names]] = True
    enough = (labels.sum(0) >= MIN_EXAMPLES).nonzero().flatten()
    return labels[:, enough], [order[column] for column in enough.tolist()]


def labelled_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    site: Site,
    documents: Sequence[tuple[str, str]],
    *,
    description: str,
    context_length: int,
    lm_batch_size: int = 16,
    norm_limit: float | None = None,
) -> LabelledActivations:
    """Documents with one label each as examples.

    Labels with fewer than `MIN_EXAMPLES` texts are left out.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        site: where in it.
        documents: (text, label) pairs.
        description: of the documents, for people.
        context_length: tokens of a document that are read.
        lm_batch_size: documents per forward pass.
        norm_limit: tokens whose activation's norm is beyond it are left out; None or 0 for no limit.

    Raises:
        InputError: fewer than two labels are left.
    """
    encoder = DocumentEncoder(tokenizer, vocabulary(model))
    windows, labels = [], []
    for text, label in documents:
        for ids in encoder.encode_each([text]):
            if isinstance(ids, UnreadableRow) or not ids:
                continue
            window = encoder.window(ids[:context_length])
            if window.keep.any():
                windows.append(window)
                labels.append((label,))
    matrix, names = _label_matrix(labels, sorted({label for (label,) in labels}))
    if len(names) < 2:
        raise InputError(
            f"{description} has {len(labels):,} texts that can be used, and {len(names)} labels with at least "
            f"{MIN_EXAMPLES} of them; probing needs two such labels."
        )
    x = run_model(model, site, windows, pad_id(tokenizer, vocabulary(model)), lm_batch_size, "Labelled documents")
    example_of = torch.repeat_interleave(torch.tensor([int(window.keep.sum()) for window in windows]))
    inlying = within_limit(x, norm_limit)
    x, example_of = x[inlying], example_of[inlying]
    return LabelledActivations(x, matrix, names, torch.arange(len(windows)), description, example_of=example_of)


def read_labelled(path: str | Path, text_column: str = "text", label_column: str = "label") -> list[tuple[str, str]]:
    """The (text, label) pairs of a .jsonl file.

    Args:
        path: of the file.
        text_column: the key of the text.
        label_column: the key of the label.

    Raises:
        InputError: there is no such file, or a line is not JSON or lacks a key.
    """
    path = Path(path).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        raise InputError(
            f"Labelled documents are read from a .jsonl file with a text and a label in each line; {path} is "
            f"{'no such file' if path.suffix == '.jsonl' else 'no .jsonl file'}."
        )
    pairs = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((str(row[text_column]), str(row[label_column])))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object with {text_column!r} and {label_column!r} "
                f"({type(error).__name__}: {error})."
            ) from None
    return pairs

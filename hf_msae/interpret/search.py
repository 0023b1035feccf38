"""Finding latents by text: which fire on a phrase more than usual, which promote a word, whose label says it.

"More than usual" is measured in bits. A latent that fires on a share q of the phrase's tokens, and on a share p of all
text, gives n · KL(q ‖ p) bits of evidence that the phrase is not ordinary text to it; the bits are weighed by how
strongly it fires, as a share of its maximum, because weak firings are the least specific. A latent that fires
everywhere scores near zero, whatever its activation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.forward import capture_counted
from hf_msae.data.windows import DocumentEncoder, pad_id, vocabulary
from hf_msae.errors import InputError
from hf_msae.interpret.activity import active_latents
from hf_msae.interpret.effects import decode_tokens
from hf_msae.interpret.store import Interpretation
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import within_limit
from hf_msae.sites import find_output_site, find_site


@dataclass(frozen=True)
class FiringHit:
    """A latent that fires on a phrase.

    Args:
        latent: its number.
        name: what it is called.
        score: bits, weighed.
        peak: its largest activation there.
        token: where it has it.
        relative: the peak over the latent's maximum in the dataset.
        fired: tokens of the phrase on which it fires.
        num_tokens: tokens of the phrase.
        firing_rate: of the latent in the dataset.
    """

    latent: int
    name: str
    score: float
    peak: float
    token: str
    relative: float
    fired: int
    num_tokens: int
    firing_rate: float


@dataclass(frozen=True)
class PromotionHit:
    """A latent that promotes a token.

    Args:
        latent: its number.
        name: what it is called.
        token: the token.
        effect: in nats per unit of activation.
        rank: of the token among those that it promotes, from 0.
    """

    latent: int
    name: str
    token: str
    effect: float
    rank: int


@dataclass(frozen=True)
class LabelHit:
    """A latent whose label shares words with what was looked for.

    Args:
        latent: its number.
        name: its label.
        score: the share of the words that its label has.
    """

    latent: int
    name: str
    score: float


@torch.no_grad()
def search_firing(
    text: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    interpretation: Interpretation,
    *,
    most: int = 20,
) -> list[FiringHit]:
    """The latents that fire on a text more than in the dataset, the most surprising first.

    Args:
        text: the phrase.
        model: in evaluation mode.
        tokenizer: its own.
        sae: in evaluation mode.
        interpretation: of the SAE.
        most: how many latents.

    Raises:
        InputError: the text has no token that counts, or the SAE does not fit the model.
    """
    site, encoder = find_site(model, sae.config), DocumentEncoder(tokenizer, vocabulary(model))
    encoded = encoder.encode([text])
    if not encoded:
        raise InputError(f"The text {text!r} has no token that counts; write a word or more.")
    window = encoder.window(encoded[0])
    other = find_output_site(model, sae.config, site)
    sites = list(dict.fromkeys([site, other]))
    captured = capture_counted(model, sites, [window], pad_id(tokenizer, vocabulary(model)))
    assert captured is not None  # the text has tokens that count
    inlying = within_limit(captured[site], interpretation.source.norm_limit)
    if other != site:
        inlying = inlying & within_limit(captured[other], sae.config.norm_limit_out).to(inlying.device)
    active = active_latents(sae, captured[site][inlying].to(sae.device))
    ids = window.input_ids[window.keep][inlying.cpu()].tolist()
    tokens = decode_tokens(tokenizer, ids)
    rates, maximum = interpretation.column("density"), interpretation.column("max_activation")
    hits = []
    for latent in active.latents.unique().tolist():
        places = (active.latents == latent).nonzero().flatten()
        values = active.values[places]
        at = int(active.tokens[places[values.argmax()]])
        peak = values.max().item()
        relative = min(1.0, peak / maximum[latent]) if maximum[latent] > 0 else 1.0
        bits = surprise_bits(len(places), len(ids), rates[latent], interpretation.source.num_tokens)
        name = interpretation.names[latent]
        score = bits * relative
        hits.append(FiringHit(latent, name, score, peak, tokens[at], relative, len(places), len(ids), rates[latent]))
    return sorted(hits, key=lambda hit: (-hit.score, hit.latent))[:most]


def surprise_bits(fired: int, num_tokens: int, firing_rate: float, dataset_tokens: int) -> float:
    """num_tokens · KL(q ‖ p) in bits, with q = fired / num_tokens and p the firing rate; 0 where q is below p.

    A firing rate of 0 or 1 is only known to within one token of the dataset.

    Args:
        fired: tokens of the phrase on which the latent fires.
        num_tokens: tokens of the phrase.
        firing_rate: of the latent in the dataset.
        dataset_tokens: tokens of the dataset.
    """
    p = min(max(firing_rate, 0.5 / dataset_tokens), 1 - 0.5 / dataset_tokens)
    q = fired / num_tokens
    if q <= p:
        return 0.0
    silent = (1 - q) * math.log2((1 - q) / (1 - p)) if q < 1 else 0.0
    return num_tokens * (q * math.log2(q / p) + silent)


def search_promoting(word: str, interpretation: Interpretation, *, most: int = 20) -> list[PromotionHit]:
    """The latents among whose most promoted tokens is a word, those with the largest effect first.

    Case and surrounding spaces do not count. A word of several tokens is found by its first one, as far as it is the
    beginning of the word and has at least three letters.

    Args:
        word: the word.
        interpretation: of the SAE.
        most: how many latents.
    """
    wanted = word.strip().casefold()
    if not wanted:
        raise InputError("An empty word was given; write the word to be promoted.")
    hits = []
    for latent, promoted in enumerate(interpretation.column("promoted")):
        for rank, effect in enumerate(promoted):
            token = effect["token"].strip().casefold()
            if token == wanted or (len(token) >= 3 and wanted.startswith(token)):
                name = interpretation.names[latent]
                hits.append(PromotionHit(latent, name, effect["token"], effect["effect"], rank))
                break
    exact = {True: 0, False: 1}
    order = sorted(hits, key=lambda hit: (exact[hit.token.strip().casefold() == wanted], -hit.effect, hit.latent))
    return order[:most]


def search_labels(text: str, interpretation: Interpretation, *, most: int = 20) -> list[LabelHit]:
    """The latents whose label has most of the words of a text; a word also counts where it begins one of the label's.

    Latents without a label are not found.

    Args:
        text: the words.
        interpretation: of the SAE.
        most: how many latents.

    Raises:
        InputError: the text has no word.
    """
    wanted = _words(text)
    if not wanted:
        raise InputError(f"{text!r} has no words to look for.")
    hits = []
    for latent, label in interpretation.labels.items():
        words = _words(label.text)
        score = sum(any(word.startswith(part) for word in words) for part in wanted) / len(wanted)
        if score > 0:
            hits.append(LabelHit(latent, label.text, score))
    return sorted(hits, key=lambda hit: (-hit.score, len(hit.name), hit.latent))[:most]


def _words(text: str) -> Sequence[str]:
    letters = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return letters.split()

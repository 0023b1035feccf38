"""What the page can do, for programs: typed functions, with JSON in and out.

Gradio serves each at `/gradio_api/call/NAME` and to `gradio_client`, and as a tool to agents that speak MCP where
`mcp` is installed. Their docstrings are what an agent reads. An SAE is named as on the page, a Hub repo or one of
those that the Space shows; without a name it is the first of these.
"""

import threading
from collections.abc import Sequence
from typing import Any

from gradio import events

from hf_msae.concepts import Finding, FoundRow
from hf_msae.steering import Steering
from msae_space import opening, validation
from msae_space.dials import read_conditions, read_dials
from msae_space.examples import asked, dials_of, lent_search, listed
from msae_space.generation import stream
from msae_space.latent_index import Hit, LatentIndex
from msae_space.library import Library
from msae_space.links import MAX_LATENT, MAX_NEW_TOKENS, MAX_SEED, MAX_TEMPERATURE
from msae_space.loaded_sae import LoadedSAE
from msae_space.reading import check_prompt, read
from msae_space.shared import reports_errors
from msae_space.strengths import MAX_STRENGTH, Condition, Dial, edits, fluent_up_to

NUM_LATENTS, NUM_CONTEXTS = 5, 5


def add_tools(library: Library) -> None:
    """Make the functions endpoints of the page; call inside its `gr.Blocks`."""

    def find(sae: str, subfolder: str) -> tuple[LoadedSAE, LatentIndex]:
        loaded = library.open(opening.find(library, sae or library.own[0], subfolder or None))
        return loaded, library.companion(loaded, LatentIndex)

    @reports_errors
    def list_saes() -> list[dict[str, Any]]:
        """List the sparse autoencoders that this Space shows, and what each reads.

        Returns:
            Of each: sae, subfolder, model, site, prefix_sizes (numbers of latents of its nested levels).
        """
        offered = []
        for source in library.own:
            for entry in library.entries(source):
                if entry.site_out is not None:  # a transcoder, which this page does not open
                    continue
                facts = {"model": entry.base_model, "site": entry.site, "prefix_sizes": entry.prefix_sizes}
                offered.append({"sae": source, "subfolder": entry.subfolder, **facts})
        return offered

    @reports_errors
    def search_latents(words: str, sae: str = "", subfolder: str = "") -> list[dict[str, Any]]:
        """Find latents (learnt features) that promote a word, or fire on a phrase.

        Args:
            words: A word, a phrase, or a latent's number.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            Those that promote the word come first: latent, level, name, why.
        """
        loaded, index = find(sae, subfolder)
        return [_described(loaded, index, hit) for hit in index.search(words)]

    @reports_errors
    def describe_latent(latent: int, sae: str = "", subfolder: str = "") -> dict[str, Any]:
        """Say what one latent does: where it fires, which tokens it makes likelier, and its relatives.

        Args:
            latent: Its number.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            latent, level, name, firing_rate (share of training tokens), maximum, fluent_up_to (the strength, in
            multiples of the maximum, up to which steered text usually stays fluent), and where it was interpreted
            promotes, suppresses, contexts (texts with the strongest token between ** **), parents, children.
        """
        loaded, index = find(sae, subfolder)
        number = loaded.checked(validation.whole(latent, "The latent", 0, MAX_LATENT))
        view = index.page(number)
        facts = {
            "latent": number,
            "level": loaded.level_of(number),
            "name": index.name(number),
            "firing_rate": loaded.firing_rates[number],
            "maximum": loaded.maxima[number],
            "fluent_up_to": round(fluent_up_to(loaded, number), 2),
        }
        if view is None:
            return {**facts, "note": index.progress}
        marked = [
            "".join(f"**{token}**" if at == one.position else token for at, token in enumerate(one.tokens))
            for one in view.top[:NUM_CONTEXTS]
        ]
        return {
            **facts,
            "promotes": [one.token for one in view.promoted],
            "suppresses": [one.token for one in view.suppressed],
            "contexts": marked,
            "parents": [_described(loaded, index, hit) for hit in index.parents(number)],
            "children": [_described(loaded, index, hit) for hit in index.children(number)],
        }

    @reports_errors
    def read_tokens(text: str, sae: str = "", subfolder: str = "") -> list[dict[str, Any]]:
        """Read a text with an SAE: its tokens, and the latents that are strongest on each.

        Args:
            text: Up to 256 tokens.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            Of each token: token, and latents, each with latent, level, name, activation; none on special tokens and
            attention sinks, which an SAE never reads.
        """
        loaded, index = find(sae, subfolder)
        found = read(loaded, validation.words(text, "The text"))
        return [
            {
                "token": piece,
                "latents": [
                    {
                        "latent": latent,
                        "level": loaded.level_of(latent),
                        "name": index.name(latent),
                        "activation": round(value, 4),
                    }
                    for latent, value in active[:NUM_LATENTS]
                ],
            }
            for piece, active in zip(found.pieces, found.active, strict=True)
        ]

    @reports_errors
    def steer_text(
        prompt: str,
        latent: int,
        strength: float = 1.0,
        max_new_tokens: int = 40,
        temperature: float = 0.7,
        seed: int = 0,
        sae: str = "",
        subfolder: str = "",
    ) -> dict[str, Any]:
        """Continue a prompt twice with the same randomness: as the language model would, and with a latent turned up.

        Args:
            prompt: How the text begins.
            latent: The latent to add at every token.
            strength: In multiples of its largest activation; `describe_latent` says up to where text stays fluent.
            max_new_tokens: 1 to 200.
            temperature: 0 takes the likeliest token.
            seed: Of the randomness.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            default and steered, each without the prompt; losses, the unsteered model's nats per token of each.
        """
        loaded, _ = find(sae, subfolder)
        number = loaded.checked(validation.whole(latent, "The latent", 0, MAX_LATENT))
        value = validation.number(strength, "The strength", -MAX_STRENGTH, MAX_STRENGTH)
        return _written(loaded, prompt, [Dial(number, value)], [], max_new_tokens, temperature, seed)

    @reports_errors
    def steer_with_latents(
        prompt: str,
        latents: list[dict[str, Any]],
        only_where: list[dict[str, Any]] | None = None,
        max_new_tokens: int = 40,
        temperature: float = 0.7,
        seed: int = 0,
        sae: str = "",
        subfolder: str = "",
    ) -> dict[str, Any]:
        """Continue a prompt with and without several latents turned up, perhaps only where other latents fire.

        Args:
            prompt: How the text begins.
            latents: Up to 8, each with latent and strength, as in `steer_text`; `find_latents` gives such a list.
            only_where: Up to 4 that must all fire for the others to act, each with latent; above, 0 to 1, the share of
                its largest activation that it must exceed (0 if left out); then, "here" on these tokens, or "after" on
                all tokens after one ("here" if left out).
            max_new_tokens: 1 to 200.
            temperature: 0 takes the likeliest token.
            seed: Of the randomness.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            As `steer_text`.
        """
        loaded, _ = find(sae, subfolder)
        dials = read_dials({"dials": _with_value(latents)}, loaded)
        conditions = read_conditions({"conditions": _with_defaults(only_where or [])}, loaded)
        return _written(loaded, prompt, dials, conditions, max_new_tokens, temperature, seed)

    @reports_errors
    def find_latents(
        positive: list[str],
        negative: list[str],
        words: str = "",
        max_latents: int = 3,
        sae: str = "",
        subfolder: str = "",
    ) -> dict[str, Any]:
        """Find the latents of a concept by examples, and a steering by a few of them; this may take minutes.

        Args:
            positive: 10 to 60 short texts that show the concept.
            negative: 10 to 60 without it, as much like the others as can be had otherwise.
            words: What the model should say, between commas; empty for the tokens typical of the positive texts.
            max_latents: In the steering, 1 to 5.
            sae: The SAE's name; empty for the first.
            subfolder: Its folder in a repo of several.

        Returns:
            steering, latents with strengths for `steer_with_latents`; at_rest and said, the probability of the words
            on neutral text without and with it; levels, each with size, best_latent, auroc (how well it tells held-out
            texts apart) and auroc_of_few; tried, the latents that were pushed, each with latent, level, name, auroc,
            said, loss; compared, the same of DiffMean, a probe and random latents; words; warnings.
        """
        loaded, index = find(sae, subfolder)
        what = asked(listed(positive), listed(negative), words, max_latents)
        *_, found = lent_search(loaded, what)
        return _found(loaded, index, found)

    for function in (list_saes, search_latents, describe_latent, read_tokens):
        events.api(function)
    for function in (steer_text, steer_with_latents):
        events.api(function, concurrency_limit=4, concurrency_id="generate")
    events.api(find_latents, concurrency_limit=1, concurrency_id="find")


def _written(
    loaded: LoadedSAE,
    prompt: Any,
    dials: Sequence[Dial],
    conditions: Sequence[Condition],
    max_new_tokens: Any,
    temperature: Any,
    seed: Any,
) -> dict[str, Any]:
    """Both texts behind a prompt, and what the unsteered model thinks of them."""
    length = validation.whole(max_new_tokens, "The number of new tokens", 1, MAX_NEW_TOKENS)
    prompt = validation.words(prompt, "The prompt")
    check_prompt(loaded, prompt, length)
    *_, last = stream(
        loaded,
        prompt,
        Steering(edits(loaded, dials, "add", conditions)),
        seed=validation.whole(seed, "The seed", 0, MAX_SEED),
        temperature=validation.number(temperature, "The temperature", 0, MAX_TEMPERATURE),
        max_new_tokens=length,
        stopped=threading.Event(),
    )
    return {"default": last.default, "steered": last.steered, "losses": last.losses}


def _with_value(latents: Any) -> Any:
    """Latents as a program names them, as the page does; what is no list of objects is left for it to refuse."""
    if not isinstance(latents, list) or not all(isinstance(one, dict) for one in latents):
        return latents
    return [{"latent": one.get("latent"), "value": one.get("strength")} for one in latents]


def _with_defaults(conditions: Any) -> Any:
    """Conditions with all that the page sends."""
    if not isinstance(conditions, list) or not all(isinstance(one, dict) for one in conditions):
        return conditions
    return [{"above": 0, "then": "here", **one} for one in conditions]


def _found(loaded: LoadedSAE, index: LatentIndex, finding: Finding) -> dict[str, Any]:
    few = next(row for row in finding.rows if row.name == "few latents")
    return {
        "steering": [{"latent": dial.latent, "strength": dial.value} for dial in dials_of(loaded, finding)],
        "at_rest": finding.at_rest,
        "said": few.effect.said,
        "levels": [
            {"size": one.prefix, "best_latent": one.latent, "auroc": one.auroc, "auroc_of_few": one.few_auroc}
            for one in finding.levels
        ],
        "tried": [
            {"latent": row.latents[0], "level": row.level, "name": index.name(row.latents[0]), **_effect(row)}
            for row in finding.latents
        ],
        "compared": [{"name": row.name, "latents": list(row.latents), **_effect(row)} for row in finding.rows],
        "words": finding.tokens,
        "warnings": finding.warnings,
    }


def _effect(row: FoundRow) -> dict[str, Any]:
    return {"auroc": row.auroc, "said": row.effect.said, "loss": row.effect.loss}


def _described(loaded: LoadedSAE, index: LatentIndex, hit: Hit) -> dict[str, Any]:
    return {
        "latent": hit.latent,
        "level": loaded.level_of(hit.latent),
        "name": index.name(hit.latent),
        "why": hit.why,
    }

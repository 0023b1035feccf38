"""What a visitor has set, as a link that restores it and as Python that does the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from hf_msae.worlds.stories import STORIES
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.strengths import (
    MAX_CONDITIONS,
    MAX_DIALS,
    MAX_STRENGTH,
    METHODS,
    PLACES,
    Condition,
    Dial,
    edits,
)
from msae_space.validation import choice, number, whole, words

POSITIONS = {"all": "prompt and new text", "generated": "new text only", "prompt": "prompt only"}
MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_SEED = 200, 1.5, 2**31 - 1
MAX_LATENT, MAX_LEVEL, MAX_NAME = 2**31 - 1, 1000, 300
TABS = ("steer", "find", "explore", "tree", "levels", "compare")


@dataclass(frozen=True)
class View:
    """Everything that a link restores."""

    key: Key
    tab: str = "steer"
    prompt: str = ""
    dials: tuple[Dial, ...] = ()
    conditions: tuple[Condition, ...] = ()
    method: str = "add"
    positions: str = "all"
    temperature: float = 0.7
    max_new_tokens: int = 60
    seed: int = 0
    text: str = ""
    latent: int | None = None
    level: int | None = None
    problems: tuple[str, ...] = field(default=(), compare=False)

    def query(self) -> str:
        """The part of the address after the question mark."""
        values: dict[str, Any] = {
            "sae": self.key.source,
            "in": self.key.subfolder,
            "tab": self.tab,
            "prompt": self.prompt,
            "latents": ",".join(f"{dial.latent}:{dial.value:g}" for dial in self.dials),
            "when": ",".join(f"{one.latent}:{one.above:g}:{one.then}" for one in self.conditions),
            "method": self.method,
            "at": self.positions,
            "temperature": f"{self.temperature:g}",
            "tokens": self.max_new_tokens,
            "seed": self.seed,
            "text": self.text,
            "latent": "" if self.latent is None else self.latent,
            "level": "" if self.level is None else self.level,
        }
        return urlencode({name: value for name, value in values.items() if value != ""})


def read_query(query: Mapping[str, str], default: Key) -> View:
    """The view that a link describes. What cannot be read is left at its default and named in `problems`."""
    problems: list[str] = []

    def read(name: str, standard: Any, reading: Callable[[str], Any]) -> Any:
        if name not in query:
            return standard
        try:
            return reading(query[name])
        except (ValueError, OverflowError):  # SpaceError is one
            problems.append(name)
            return standard

    return View(
        key=read("sae", default, lambda text: Key(words(text, "", MAX_NAME), words(query.get("in"), "", MAX_NAME))),
        tab=read("tab", "steer", lambda text: choice(text, "tab", TABS)),
        prompt=read("prompt", "", lambda text: words(text, "")),
        dials=read("latents", (), _read_dials),
        conditions=read("when", (), _read_conditions),
        method=read("method", "add", lambda text: choice(text, "method", METHODS)),
        positions=read("at", "all", lambda text: choice(text, "place", POSITIONS)),
        temperature=read("temperature", 0.7, lambda text: number(float(text), "", 0, MAX_TEMPERATURE)),
        max_new_tokens=read("tokens", 60, lambda text: whole(int(text), "", 1, MAX_NEW_TOKENS)),
        seed=read("seed", 0, lambda text: whole(int(text), "", 0, MAX_SEED)),
        text=read("text", "", lambda text: words(text, "")),
        latent=read("latent", None, lambda text: whole(int(text), "", 0, MAX_LATENT)),
        level=read("level", None, lambda text: whole(int(text), "", 0, MAX_LEVEL)),
        problems=tuple(problems),
    )


def _read_dials(text: str) -> tuple[Dial, ...]:
    """Raises ValueError, or SpaceError, which is one."""
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    if len(pairs) > MAX_DIALS:
        raise SpaceError(f"Up to {MAX_DIALS} latents are steered at once.")
    return tuple(
        Dial(
            whole(int(latent), "A latent", 0, MAX_LATENT),
            number(float(value), "A strength", -MAX_STRENGTH, MAX_STRENGTH),
        )
        for latent, value in pairs
    )


def _read_conditions(text: str) -> tuple[Condition, ...]:
    """Raises ValueError, or SpaceError, which is one."""
    parts = [part.split(":") for part in text.split(",") if part]
    if len(parts) > MAX_CONDITIONS:
        raise SpaceError(f"Up to {MAX_CONDITIONS} conditions hold at once.")
    return tuple(
        Condition(
            whole(int(latent), "A latent", 0, MAX_LATENT),
            number(float(above), "A threshold", 0, MAX_STRENGTH),
            choice(then, "place", PLACES),
        )
        for latent, above, then in parts
    )


def as_python(loaded: LoadedSAE, view: View) -> str:
    """A program that prints the steered text of this view."""
    config = loaded.sae.config
    subfolder = f", subfolder={loaded.key.subfolder!r}" if loaded.key.subfolder else ""
    if config.base_model == STORIES:
        imports = "from hf_msae.worlds.stories import load_story_lm"
        load = "model, tokenizer = load_story_lm()"
    else:
        revision = f", revision={config.base_model_revision!r}" if config.base_model_revision else ""
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load = (
            f"model = AutoModelForCausalLM.from_pretrained({config.base_model!r}{revision}).eval()\n"
            f"tokenizer = AutoTokenizer.from_pretrained({config.base_model!r}{revision})"
        )
    all_edits = edits(loaded, view.dials, view.method, view.conditions)
    gates = all_edits[0].gates if all_edits else ()
    listed_gates = ", ".join(
        f"Gate({gate.latent}, above={gate.above!r}, units={gate.units!r}, then={gate.then!r})" for gate in gates
    )
    under = ", when=gates" if gates else ""
    written = [
        f"    LatentEdit({edit.latent}, {edit.value!r}, method={edit.method!r}, units={edit.units!r}{under}),\n"
        for edit in all_edits
    ]
    listed = f"[\n{''.join(written)}]" if written else "[]"
    first, *rest = sorted([imports, "from hf_msae import MatryoshkaSAE"], key=lambda line: "transformers" not in line)
    lines = [
        first,
        *rest,
        f"from hf_msae.steering import {'Gate, ' if gates else ''}LatentEdit, SteeredPipeline, Steering",
        "",
        f"sae = MatryoshkaSAE.from_pretrained({loaded.key.source!r}{subfolder})",
        load,
        *([f"gates = [{listed_gates}]"] if gates else []),
        f"steering = Steering({listed}, positions={view.positions!r})",
        "pipe = SteeredPipeline(model, tokenizer, sae, steering)",
        f"prompt = {view.prompt!r}",
        f"answer = pipe(prompt, seed={view.seed}, temperature={view.temperature!r}, "
        f"max_new_tokens={view.max_new_tokens})",
        'print(answer[0]["generated_text"])',
        "",
    ]
    return "\n".join(lines)

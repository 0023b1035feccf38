"""What a visitor has set, as a link that restores it and as Python that does the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from hf_msae.hub import STORIES
from msae_space.library import Key, Workbench
from msae_space.strengths import METHODS, Dial, edits

POSITIONS = {"all": "prompt and new text", "generated": "new text only", "prompt": "prompt only"}
MAX_TEXT = 2000
MAX_NEW_TOKENS = 200
TABS = ("steer", "explore", "tree", "levels", "compare")


@dataclass(frozen=True)
class View:
    """Everything that a link restores."""

    key: Key
    tab: str = "steer"
    prompt: str = ""
    dials: tuple[Dial, ...] = ()
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

    def number(name: str, standard: Any, low: float, high: float, kind: type = int) -> Any:
        if name not in query:
            return standard
        try:
            value = kind(query[name])
            if not low <= value <= high:
                raise ValueError
            return value
        except ValueError:
            problems.append(name)
            return standard

    def choice(name: str, standard: str, known: Any) -> str:
        if query.get(name, standard) not in known:
            problems.append(name)
            return standard
        return query.get(name, standard)

    try:
        pairs = [pair.split(":") for pair in query.get("latents", "").split(",") if pair]
        dials = tuple(Dial(int(latent), float(value)) for latent, value in pairs)
        if not all(math.isfinite(dial.value) for dial in dials):
            raise ValueError
    except ValueError:
        problems.append("latents")
        dials = ()
    return View(
        key=Key(query["sae"], query.get("in", "")) if "sae" in query else default,
        tab=choice("tab", "steer", TABS),
        prompt=query.get("prompt", "")[:MAX_TEXT],
        dials=dials,
        method=choice("method", "add", METHODS),
        positions=choice("at", "all", POSITIONS),
        temperature=number("temperature", 0.7, 0, 2, float),
        max_new_tokens=number("tokens", 60, 1, MAX_NEW_TOKENS),
        seed=number("seed", 0, 0, 2**31 - 1),
        text=query.get("text", "")[:MAX_TEXT],
        latent=number("latent", None, 0, 2**31 - 1),
        level=number("level", None, 1, 1000),
        problems=tuple(problems),
    )


def as_python(bench: Workbench, view: View) -> str:
    """A program that prints the steered text of this view."""
    config = bench.sae.config
    subfolder = f", subfolder={bench.key.subfolder!r}" if bench.key.subfolder else ""
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
    written = [
        f"    LatentEdit({edit.latent}, {edit.value!r}, method={edit.method!r}, units={edit.units!r}),\n"
        for edit in edits(bench, view.dials, view.method)
    ]
    listed = f"[\n{''.join(written)}]" if written else "[]"
    first, *rest = sorted([imports, "from hf_msae import MatryoshkaSAE"], key=lambda line: "transformers" not in line)
    lines = [
        first,
        *rest,
        "from hf_msae.steering import LatentEdit, SteeredPipeline, Steering",
        "",
        f"sae = MatryoshkaSAE.from_pretrained({bench.key.source!r}{subfolder})",
        load,
        f"steering = Steering({listed}, positions={view.positions!r})",
        "pipe = SteeredPipeline(model, tokenizer, sae, steering)",
        f"prompt = {view.prompt!r}",
        f"answer = pipe(prompt, seed={view.seed}, temperature={view.temperature!r}, "
        f"max_new_tokens={view.max_new_tokens})",
        'print(answer[0]["generated_text"])',
        "",
    ]
    return "\n".join(lines)

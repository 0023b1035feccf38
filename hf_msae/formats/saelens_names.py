"""TransformerLens' names of models and places, and ours.

SAELens says which language model and which place an SAE is for in the words of TransformerLens: "gemma-2-2b" and
"blocks.12.hook_resid_post", where the Hub says "google/gemma-2-2b" and `hf_msae.sites` says "layers.12". Most places
are the same in every architecture. Some exist under a name that depends on it, and only for those is the architecture
looked up, by the model's name: the language model itself is never loaded to read an SAE.
"""

import re
from typing import Any

from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.sites import Site, SiteError

# Models that TransformerLens calls by what follows the slash.
_SAME_NAME = {
    "EleutherAI": (
        *(
            f"pythia-{size}{data}"
            for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
            for data in ("", "-deduped")
        ),
        *("pythia-14m", "pythia-31m", "gpt-j-6B", "gpt-neo-125M", "gpt-neo-1.3B", "gpt-neo-2.7B", "gpt-neox-20b"),
    ),
    "google": (
        *(f"gemma-{size}{tuning}" for size in ("2b", "7b", "2-2b", "2-9b", "2-27b") for tuning in ("", "-it")),
        *(f"gemma-3-{size}{tuning}" for size in ("1b", "4b", "12b", "27b") for tuning in ("-pt", "-it")),
        *("gemma-3-270m", "gemma-3-270m-it"),
    ),
    "facebook": tuple(f"opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")),
    "bigscience": tuple(f"bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1")),
    "microsoft": ("phi-1", "phi-1_5", "phi-2", "phi-4"),
}
# Models that TransformerLens calls by what follows the slash in lower case.
_LOWER_CASE = (
    *(
        f"Qwen/Qwen{generation}-{size}B{tuning}"
        for generation, sizes, tuning_name in (
            ("1.5", ("0.5", "1.8", "4", "7", "14"), "-Chat"),
            ("2", ("0.5", "1.5", "7"), "-Instruct"),
            ("2.5", ("0.5", "1.5", "3", "7", "14", "32", "72"), "-Instruct"),
        )
        for size in sizes
        for tuning in ("", tuning_name)
    ),
    *(f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")),
)
_OTHER_NAMES = {
    "gpt2-small": "gpt2",
    "distillgpt2": "distilgpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "phi-3": "microsoft/Phi-3-mini-4k-instruct",
    "Llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "Llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "Llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "Llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    **{f"tiny-stories-{size}": f"roneneldan/TinyStories-{size}" for size in ("1M", "3M", "8M", "28M", "33M")},
}
# Models that both call alike.
_ALIKE = (
    *("gpt2-medium", "gpt2-large", "gpt2-xl"),
    *(
        f"meta-llama/{name}{tuning}"
        for name in ("Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B")
        for tuning in ("", "-Instruct")
    ),
)
_HUB_NAMES = {
    **{name: f"{owner}/{name}" for owner, names in _SAME_NAME.items() for name in names},
    **{name.partition("/")[2].lower(): name for name in _LOWER_CASE},
    **_OTHER_NAMES,
    **{name: name for name in _ALIKE},
}
_LENS_NAMES = {hub: lens for lens, hub in _HUB_NAMES.items()}

# Places that every architecture has, by the name inside a block.
_COMMON = {
    "hook_resid_pre": "layers.{}:input",
    "hook_resid_post": "layers.{}",
    "hook_attn_out": "layers.{}.attn",
    "hook_mlp_out": "layers.{}.mlp",
}
_LLAMA = {
    "hook_resid_mid": "layers.{}.post_attention_layernorm:input",
    "attn.hook_z": "layers.{}.self_attn.o_proj:input",
    "mlp.hook_post": "layers.{}.mlp.down_proj:input",
}
# TransformerLens hooks what a sublayer adds to the residual stream. Gemma 2 and 3 normalise it first.
_GEMMA_2 = _LLAMA | {
    "hook_resid_mid": "layers.{}.pre_feedforward_layernorm:input",
    "hook_attn_out": "layers.{}.post_attention_layernorm",
    "hook_mlp_out": "layers.{}.post_feedforward_layernorm",
}
_GPT_2 = {
    "hook_resid_mid": "layers.{}.ln_2:input",
    "attn.hook_z": "layers.{}.attn.c_proj:input",
    "mlp.hook_post": "layers.{}.mlp.c_proj:input",
}
_GPT_NEOX = {
    "attn.hook_z": "layers.{}.attention.dense:input",
    "mlp.hook_post": "layers.{}.mlp.dense_4h_to_h:input",
}
_ARCHITECTURES = (
    (re.compile(r"google/gemma-[23]-\d.*"), _GEMMA_2),
    (re.compile(r"google/gemma-\d+b.*|meta-llama/.*|mistralai/Mistral-7B.*|Qwen/Qwen(1\.5|2|2\.5|3)-.*"), _LLAMA),
    (re.compile(r"(openai-community/)?gpt2.*|(distilbert/)?distilgpt2"), _GPT_2),
    (re.compile(r"EleutherAI/(pythia|gpt-neox)-.*"), _GPT_NEOX),
)
# TransformerLens keeps Gemma's scaling in its embedding; transformers applies it between embedding and first layer.
_SCALED_EMBEDDING = re.compile(r"google/gemma-.*")

# Arguments of TransformerLens' loader that change a model's weights, and with them its activations.
_PROCESSING = ("fold_ln", "center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# Not any path with a layer in it: a multimodal model's vision tower has layers, too.
_LAYER = re.compile(
    r"(?:(?:model|transformer|gpt_neox|decoder|language_model)\.)*(?:layers|h|blocks)\.(\d+)(?:\.(.+))?"
)
_ATTENTION_MODULES = ("self_attn", "attention", "self_attention")
_EMBEDDING_MODULES = ("embeddings", "wte", "embed_tokens", "embed_in")


def model_on_hub(name: str) -> str | None:
    """The Hub id of a model that TransformerLens knows as `name`, which may be the id itself. None where unknown."""
    return name if "/" in name or name in _LENS_NAMES else _HUB_NAMES.get(name)


def model_in_lens(base_model: str) -> str | None:
    """TransformerLens' name of a model of the Hub, None where this module knows none."""
    return _LENS_NAMES.get(base_model.removeprefix("openai-community/").removeprefix("distilbert/"))


def site_of_hook(hook_name: str, base_model: str | None) -> str | None:
    """The site, as `hf_msae.sites` writes it, of a hook of TransformerLens or a module path of transformers.

    None where transformers has no such place, or where its name depends on an architecture that `base_model` (a Hub
    id, or None) does not tell.
    """
    if not hook_name.rpartition(".")[2].startswith("hook_"):
        return _site_or_none(hook_name)
    if hook_name == "hook_embed":
        return "layers.0:input" if _SCALED_EMBEDDING.fullmatch(base_model or "") else "embeddings"
    match = _BLOCK.fullmatch(hook_name)
    form = _places(base_model).get(match[2]) if match else None
    return form.format(match[1]) if match and form else None


def site_of_path(path: str) -> str | None:
    """Give the site of a module path, None where it is none.

    The path may end in ".input" or ".output", as in configurations made from Gemma Scope's ("model.layers.12.output").
    """
    module, _, io = path.rpartition(".")
    return _site_or_none(f"{module}:{io}" if module and io in ("input", "output") else path)


def hook_of_site(site: str, base_model: str) -> str | None:
    """TransformerLens' hook at a site (a canonical path or a short form) of a model of the Hub; None without equal."""
    place = Site.parse(site)
    suffix = ":input" if place.io == "input" else ""
    if place.path.rpartition(".")[2] in _EMBEDDING_MODULES and not suffix:
        return None if _SCALED_EMBEDDING.fullmatch(base_model) else "hook_embed"
    match = _LAYER.fullmatch(place.path)
    if match is None:
        return None
    inside = f".{'attn' if match[2] in _ATTENTION_MODULES else match[2]}" if match[2] else ""
    wanted = f"layers.{{}}{inside}{suffix}"
    hook = next((hook for hook, form in _places(base_model).items() if form == wanted), None)
    return f"blocks.{match[1]}.{hook}" if hook else None


def origin(metadata: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The part of the configuration that says where the activations come from.

    `metadata` is SAELens', with `is_current` added: whether version 6 or later wrote it, which loads language models
    without changing their weights unless it says so. What a user should know is appended to `notes`.
    """
    model, hook = metadata.get("model_name"), metadata.get("hook_name")
    base_model = model_on_hub(model) if model else None
    if model and base_model is None:
        notes.append(f"The Hub id of {model!r}, a name of TransformerLens, is not known here; base_model keeps it.")
    prepend_bos = metadata.get("prepend_bos")
    loading = metadata.get("model_from_pretrained_kwargs") or {}
    if model:
        _note_processing(loading, metadata["is_current"], notes)
    return {
        "base_model": base_model or model,
        "base_model_revision": loading.get("revision"),
        "site": _site(metadata, hook, base_model, notes),
        **_site_out(metadata, base_model, notes),
        "prepend_bos": True if prepend_bos is None else bool(prepend_bos),
        "context_length": metadata.get("context_size"),
    }


def _site(metadata: dict[str, Any], hook: str | None, base_model: str | None, notes: list[str]) -> str | None:
    path, head = metadata.get("hf_hook_name"), metadata.get("hook_head_index")
    if head is not None:
        notes.append(f"It reads head {head} of {hook} alone, which is no site here; config.site is None.")
        return None
    site = site_of_path(path) if path else site_of_hook(hook, base_model) if hook else None
    if site is None and hook:
        notes.append(f"{hook} of {base_model or 'its model'} is no site that is known here; config.site is None.")
    return site


def _site_out(metadata: dict[str, Any], base_model: str | None, notes: list[str]) -> dict[str, str | None]:
    """The place that a transcoder writes; empty for an SAE, which has none."""
    path, hook = metadata.get("hf_hook_name_out"), metadata.get("hook_name_out")
    if hook in (None, metadata.get("hook_name")) and path in (None, metadata.get("hf_hook_name")):
        return {}
    site = site_of_path(path) if path else site_of_hook(str(hook), base_model)
    if site is None:
        notes.append(f"{hook} of {base_model or 'its model'} is no site that is known here; config.site_out is None.")
    return {"site_out": site}


def _note_processing(loading: dict[str, Any], is_current: bool, notes: list[str]) -> None:
    processed = [name for name in _PROCESSING if loading.get(name)]
    if processed:
        notes.append(
            f"The language model was loaded with {', '.join(processed)}, by which TransformerLens changes weights: "
            "activations of the Hub's model are not those that this SAE was trained on."
        )
    elif not is_current and "center_writing_weights" not in loading:
        notes.append(
            "How the language model was loaded is not recorded. If TransformerLens centred the weights that write "
            "into the residual stream, each activation of the Hub's model must have its mean subtracted first."
        )


def written_origin(config: MatryoshkaSAEConfig) -> dict[str, Any]:
    """Model and place in TransformerLens' words where both are known there, else in those of transformers."""
    model = model_in_lens(config.base_model) if config.base_model else None
    hook = hook_of_site(config.site, str(config.base_model)) if model and config.site else None
    metadata = {
        "model_name": model if hook else config.base_model,
        "model_class_name": "HookedTransformer" if hook else "AutoModelForCausalLM",
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": config.context_length,
        "prepend_bos": config.prepend_bos,
        "seqpos_slice": None,
        "model_from_pretrained_kwargs": {"revision": config.base_model_revision} if config.base_model_revision else {},
    }
    if config.site:
        site = Site.parse(config.site)
        # SAELens hooks the output of the module that a path names; the input has no name there but ours.
        metadata["hook_name"] = hook or (site.path if site.io == "output" else str(site))
        metadata["hf_hook_name"] = str(site)
    if config.site_out:
        written = Site.parse(config.site_out)
        hook_out = hook_of_site(config.site_out, str(config.base_model)) if hook else None
        metadata["hook_name_out"] = hook_out or (written.path if written.io == "output" else str(written))
        metadata["hook_head_index_out"] = None
        metadata["hf_hook_name_out"] = str(written)
    measured = (config.measured or {}).get("l0")
    return metadata | ({"l0": measured[-1]} if measured else {})


def _places(base_model: str | None) -> dict[str, str]:
    special = (places for pattern, places in _ARCHITECTURES if pattern.fullmatch(base_model or ""))
    return _COMMON | next(special, {})


def _site_or_none(text: str) -> str | None:
    try:
        return str(Site.parse(text))
    except SiteError:
        return None

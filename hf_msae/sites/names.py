"""Names of sites: their short forms, the module paths that they mean, and paths behind wrappers.

A site is the input or the output of one module, written as a module path and a direction: `model.layers.12:output`.
Short forms name the usual sites of any architecture (`layers.12`, `layers.12.mlp`, `embeddings`); `resolve_site` turns
them into the canonical path, which is what a checkpoint stores.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_msae.errors import InputError

# Each entry is one module of a layer under its possible paths, most specific first. BERT-like attention and output
# blocks add the residual and normalise before they return, so the projection inside them is the sublayer's own output.
_SUBLAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn": (
        ("self_attn",),
        ("attn",),
        ("attention.output.dense", "attention.attn", "attention"),
        ("self_attention",),
        ("linear_attn",),
        ("multi_head_attention",),
    ),
    "mlp": (
        ("mlp",),
        ("feed_forward",),
        ("ffn",),
        ("block_sparse_moe",),
        ("shared_mlp",),
        ("experts",),
        ("moe",),
        ("mlp_block",),
        ("fc2",),
        ("output.dense",),
    ),
}
# These take the residual stream as a second argument and return it with their own output added.
_BEFORE_RESIDUAL = {"BloomAttention": "dense", "BloomMLP": "dense_4h_to_h", "MptMLP": "down_proj"}

# What wrappers put into the paths of what they wrap: torch.compile, FSDP and checkpointing around any module; DDP and
# DataParallel, and PEFT, around a model.
_AROUND_MODULES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AROUND_MODELS = ("module.", "base_model.model.")

_LAYER_FORM = re.compile(r"layers\.(-?\d+)(?:\.(.+))?")


class SiteError(InputError):
    """A site that the model does not have, or one whose value is not a (batch, sequence, hidden) activation."""


@dataclass(frozen=True)
class Site:
    """The input or the output of one module of a language model; `str(site)` and `Site.parse` are inverse.

    path: the module's dotted path, as in `model.named_modules()`.
    io: "input" or "output".
    Raises SiteError for an empty path and for any other `io`.
    """

    path: str
    io: str = "output"

    def __post_init__(self) -> None:
        if not self.path or self.io not in ("input", "output"):
            raise SiteError(
                f"not a site: {self.path!r}:{self.io!r}; expected a module path, then ':input' or ':output', "
                "such as 'model.layers.12:output'"
            )

    def __str__(self) -> str:
        return f"{self.path}:{self.io}"

    def without_wrappers(self) -> "Site":
        """The site as the bare model has it, which is what a checkpoint stores: it resolves on every wrapper too."""
        return Site(_bare(self.path), self.io)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read `path:input` or `path:output`; a path alone means its output. No model is asked."""
        path, colon, io = text.partition(":")
        return cls(path, io if colon else "output")


def resolve_site(model: PreTrainedModel, name: str | Site) -> Site:
    """Find a site in a model by its path or its short form, and return it with the canonical path.

    Short forms, each with an optional `:input` or `:output` (the default):

    - `layers.12`, `layers.-1`: the residual stream after a layer. Layers are the shallowest `nn.ModuleList` of length
      `num_hidden_layers`. (`layers.-1` is before the final norm, unlike the last `hidden_states` of most models.)
    - `layers.12.attn`, `layers.12.mlp`: what that sublayer computes, before the residual stream is added, and before
      the norm that some architectures put behind it (Gemma 2: `layers.12.post_feedforward_layernorm` is after).
    - `layers.12.<path>`: any other module inside the layer, such as `layers.12.mlp.down_proj`.
    - `embeddings`: the input (token) embedding.

    A full path may be given as seen from the model with its head or from the base model inside; either is found in
    either. The canonical path is as seen from the model passed. A bare name is read as a short form first; a `Site`,
    or a name that says `:input` or `:output`, as a full path first, so that resolving a canonical site returns it.

    Raises SiteError where there is no such module, with the nearest names and the short forms that this model has.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise SiteError(f"{type(model).__name__} wraps the model that has the sites; give what is in it: model.module")
    site = name if isinstance(name, Site) else Site.parse(name)
    lookups: list[Callable[[PreTrainedModel, str], str | None]] = [_short_form, _full_path]
    if isinstance(name, Site) or ":" in name:
        lookups.reverse()
    for lookup in lookups:
        path = lookup(model, site.path)
        if path is not None:
            return Site(path, site.io)
    near = difflib.get_close_matches(site.path, [path for path, _ in model.named_modules() if path], n=3)
    suggestion = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise SiteError(f"{type(model).__name__} has no site {site.path!r}.{suggestion} {_valid_forms(model)}")


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _full_path(model: PreTrainedModel, path: str) -> str | None:
    prefix = f"{model.base_model_prefix}."
    other = path.removeprefix(prefix) if model.base_model is model else prefix + path
    # PEFT passes on attributes of the model inside, so its modules also answer to paths that they do not have.
    candidates = (f"base_model.model.{path}", path, other)
    found = next((candidate for candidate in candidates if _has_module(model, candidate)), None)
    if found is not None:
        return found
    wanted = {_bare(path), _bare(other)}
    return next((name for name, _ in model.named_modules() if name and _bare(name) in wanted), None)


def _bare(path: str) -> str:
    """A module's path as the model without wrappers has it."""
    parts = [part for part in path.split(".") if part not in _AROUND_MODULES]
    inside = ".".join(parts)
    while wrapper := next((prefix for prefix in _AROUND_MODELS if inside.startswith(prefix)), None):
        inside = inside.removeprefix(wrapper)
    return inside or path


def _short_form(model: PreTrainedModel, path: str) -> str | None:
    if path == "embeddings":
        embeddings = model.get_input_embeddings()
        return next(name for name, module in model.named_modules() if module is embeddings)
    match = _LAYER_FORM.fullmatch(path)
    if match is None:
        return None
    stack_path, stack = _layer_stack(model)
    index, inside = int(match[1]), match[2]
    if not -len(stack) <= index < len(stack):
        raise SiteError(f"{type(model).__name__} has {len(stack)} layers, so no {path!r}. {_valid_forms(model)}")
    layer_path = f"{stack_path}.{index % len(stack)}"
    if inside is None:
        return layer_path
    layer = model.get_submodule(layer_path)
    inside = _sublayer(layer, layer_path, inside) if inside in _SUBLAYERS else inside
    return f"{layer_path}.{inside}" if _has_module(layer, inside) else None


def _sublayer(layer: nn.Module, layer_path: str, kind: str) -> str:
    known = (next((path for path in paths if _has_module(layer, path)), None) for paths in _SUBLAYERS[kind])
    found = [path for path in known if path is not None]
    if len(found) != 1:
        children = [name for name, _ in layer.named_children()]
        what = f"has several modules that could be .{kind}" if found else f"has no known .{kind} module"
        raise SiteError(
            f"layer {layer_path} ({type(layer).__name__}) {what}; its modules are {', '.join(children)}. "
            f"Name one by its path, such as '{layer_path}.{children[-1]}:output'"
        )
    inside = _BEFORE_RESIDUAL.get(type(layer.get_submodule(found[0])).__name__)
    return f"{found[0]}.{inside}" if inside else found[0]


def _layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    if model.config.is_encoder_decoder:
        raise SiteError(
            f"{type(model).__name__} has an encoder and a decoder, so 'layers.<number>' does not say which. Name the "
            "site by its full module path"
        )
    config = model.config.get_text_config()
    try:
        count = config.num_hidden_layers
    except AttributeError:
        raise SiteError(
            f"{type(config).__name__} does not say num_hidden_layers, so 'layers.<number>' has no meaning here. "
            "Name the site by its full module path"
        ) from None
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(path, module) for path, module in lists if len(module) == count]
    # A model that also reads images has a stack for them; the one for text lies beside the token embedding.
    embedding = model.get_input_embeddings()
    beside = next(path for path, module in model.named_modules() if module is embedding).rpartition(".")[0] + "."
    stacks = [(path, module) for path, module in stacks if path.startswith(beside)] or stacks
    depth = min((path.count(".") for path, _ in stacks), default=0)
    shallowest = [(path, module) for path, module in stacks if path.count(".") == depth]
    if len(shallowest) != 1:
        paths = [path for path, _ in shallowest] or [f"{path} ({len(module)})" for path, module in lists]
        what = "more than one stack" if shallowest else "no stack"
        raise SiteError(
            f"{type(model).__name__} has {what} of num_hidden_layers = {count} modules, so 'layers.<number>' does not "
            f"say which; its module lists: {', '.join(paths) or 'none'}. Name the site by its full module path"
        )
    return shallowest[0]


def _valid_forms(model: PreTrainedModel) -> str:
    try:
        path, stack = _layer_stack(model)
    except SiteError as error:
        return f"Valid short form: embeddings ({error})"
    return (
        f"Valid short forms: layers.0 … layers.{len(stack) - 1}, each also with .attn or .mlp; embeddings. "
        f"Or a full module path, such as '{path}.0:output'"
    )

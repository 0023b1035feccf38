"""What circuit-tracer's loader of transcoders reads: `layer_<n>.safetensors` for each layer, and one `config.yaml`.

Its tensors are ours, in our orientation (W_enc and W_dec (num_latents, width), W_skip (width, width)), and a threshold
for each latent makes a JumpReLU. The configuration names what transcoders read and write in TransformerLens' words.
circuit-tracer wants every layer of a model from 0 on: so several transcoders are written into one folder, and of a
single one the file is to be laid beside the others'. Nothing is read here: the files do not say their language model.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hf_msae.atomic_files import atomic_folder
from hf_msae.errors import InputError
from hf_msae.formats.common import refuse_tokenized
from hf_msae.modeling import MatryoshkaSAE

LIBRARY = "circuit-tracer"
CONFIG = "config.yaml"
# What an MLP reads and writes; Gemma 2 and 3 normalise both, inside what TransformerLens takes for the MLP.
_HOOKS_IN = {"mlp:input": "mlp.hook_in", "pre_feedforward_layernorm:output": "mlp.hook_in"}
_HOOKS_OUT = {"mlp:output": "mlp.hook_out", "post_feedforward_layernorm:output": "hook_mlp_out"}
_PLACE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(\w+:\w+)")


def write(sae: MatryoshkaSAE, folder: str | Path) -> None:
    """Write one transcoder's file and the configuration into a new or empty folder; see [`write_set`]."""
    write_set([sae], folder)


def write_set(transcoders: Sequence[MatryoshkaSAE], folder: str | Path) -> None:
    """Write transcoders of several layers as circuit-tracer reads them, into a new or empty folder.

    The folder appears whole or not at all.

    Args:
        transcoders: One of each layer, all of one activation, that read an MLP's input and write its output.
        folder: Where to.

    Raises:
        InputError: For what circuit-tracer cannot express, and two transcoders of one layer.
        OutputExistsError: Something is in the folder.
    """
    layers: dict[int, MatryoshkaSAE] = {}
    settings: dict[str, object] = {}
    for sae in transcoders:
        refuse_tokenized(sae, LIBRARY)
        layer, hooks = _place(sae)
        own = {"model_kind": "transcoder_set", **hooks, **_activation(sae)}
        own |= {"model_name": sae.config.base_model} if sae.config.base_model else {}
        if layer in layers or (settings and own != settings):
            raise InputError(
                f"circuit-tracer wants one transcoder for each layer, all alike; two are of layer {layer}, or differ "
                f"in what they say: {settings} and {own}."
            )
        layers[layer], settings = sae, own
    with atomic_folder(Path(folder)) as new:
        for layer, sae in layers.items():
            save_file(_tensors(sae), new / f"layer_{layer}.safetensors", metadata={"format": "pt"})
        # JSON is YAML, too.
        (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _place(sae: MatryoshkaSAE) -> tuple[int, dict[str, str]]:
    """The layer, and what is read and written in circuit-tracer's words."""
    config = sae.config
    found = [_PLACE.fullmatch(site or "") for site in (config.site, config.site_out)]
    if not config.is_transcoder or config.hidden_size != config.output_size or None in found:
        raise _no_mlp(sae)
    read, written = (match for match in found if match is not None)
    if read[1] != written[1] or read[2] not in _HOOKS_IN or written[2] not in _HOOKS_OUT:
        raise _no_mlp(sae)
    hooks = {"feature_input_hook": _HOOKS_IN[read[2]], "feature_output_hook": _HOOKS_OUT[written[2]]}
    return int(read[1]), hooks


def _no_mlp(sae: MatryoshkaSAE) -> InputError:
    config = sae.config
    return InputError(
        "circuit-tracer replaces MLPs by transcoders of one width that read an MLP's input and write its output, such "
        f"as site=layers.12.mlp:input and site_out=layers.12.mlp:output; this has site={config.site} (of "
        f"{config.hidden_size}) and site_out={config.site_out} (of {config.output_size})."
    )


def _activation(sae: MatryoshkaSAE) -> dict[str, object]:
    if sae.config.inference == "topk":
        return {"activation": "topk", "k": round(sae.config.k)}
    return {} if _has_threshold(sae) else {"activation": "relu"}


def _has_threshold(sae: MatryoshkaSAE) -> bool:
    return sae.config.inference == "threshold" and (sae.config.activation != "relu" or bool(sae.threshold.any()))


def _tensors(sae: MatryoshkaSAE) -> dict[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in sae.named_parameters() if name != "threshold"}
    if _has_threshold(sae):
        tensors["activation_function.threshold"] = sae.threshold.detach().to(sae.W_enc.dtype)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

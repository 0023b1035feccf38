"""What only text can tell of an SAE, written into it: for checkpoints of other libraries, which record none of it.

People steer in units of a latent's largest activation, and choose latents by how often they fire. A batch TopK SAE
that was saved without a threshold computes nothing for a token alone, until one is set on text.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.documents import DocumentsLike
from hf_msae.data.lookups import check_lookup
from hf_msae.devices import device_of
from hf_msae.evaluation.activations import TextActivations, collect
from hf_msae.metrics import Measurement, ReconstructionMeter, measured_facts, merge
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import find_output_site, find_site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.loaders import window_length


def lacks_threshold(sae: MatryoshkaSAE) -> bool:
    """Whether an SAE selects by a threshold that was never set.

    Args:
        sae: the SAE.
    """
    by_threshold = sae.config.activation == "batch_topk" and sae.config.inference == "threshold"
    return by_threshold and not bool(sae.threshold.any())


@torch.no_grad()
def complete(sae: MatryoshkaSAE, text: TextActivations) -> Measurement:
    """Record in an SAE what only text can tell of it.

    This is each latent's maximum and firing rate, L0 and FVE per prefix, and the limit of the norm. Where it has no
    threshold, one is set on the first half of the text, and the second half is measured on.

    Args:
        sae: in evaluation mode; it is changed.
        text: activations of its site.

    Returns:
        What was measured.
    """
    x, y, ids = text.x, text.y, text.token_ids
    if lacks_threshold(sae):
        half = len(x) // 2
        sae.calibrate_threshold(part.to(sae.device) for part in sae.in_parts(x[:half]))
        x, y, ids = x[half:], None if y is None else y[half:], ids[half:]
    meter = ReconstructionMeter(sae)
    meter.update(x, y, ids)
    sae.max_activation.copy_(meter.max_activation)
    sae.firing_rate.copy_(meter.firing_rate)
    measurement = merge(meter, None)
    sae.config.measured = measured_facts(measurement)
    sae.config.norm_limit, sae.config.norm_limit_out = text.norm_limit, text.norm_limit_out
    return measurement


def complete_on_text(
    sae: MatryoshkaSAE,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsLike,
    *,
    site: str | None = None,
    num_tokens: int = 200_000,
    called: str = "",
) -> Measurement:
    """Run a language model over text and record in an SAE what it tells: see [`complete`].

    The configuration gets the site and the language model, too, where it does not say.

    Args:
        sae: it is changed, and brought to the device of the process.
        model: the language model.
        tokenizer: its own.
        documents: `Documents`, or what `as_documents` takes.
        site: where in the model, if the SAE does not say.
        num_tokens: how many tokens to read.
        called: the SAE's name in errors.

    Returns:
        What was measured.

    Raises:
        InputError: the SAE does not fit the site, or an activation is NaN or infinite.
        DatasetError: the documents have fewer tokens.
    """
    config = sae.config
    found = find_site(model, config, site, called=called)
    check_lookup(config, model, tokenizer, called=called)
    length = window_length(model, SAETrainingArguments(context_length=config.context_length))
    found_out = find_output_site(model, config, found, called=called) if config.is_transcoder else None
    text = collect(
        model, tokenizer, found, documents, num_tokens=num_tokens, context_length=length, site_out=found_out
    )
    measurement = complete(sae.to(device_of(model)).eval(), text)  # type: ignore[arg-type]
    config.site = config.site or str(found)
    config.base_model = config.base_model or model.config.name_or_path or None
    return measurement

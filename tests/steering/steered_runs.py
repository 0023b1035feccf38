"""Two short texts on a tiny model: logits, greedy continuations, and activations at an SAE's site."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_msae.sites import capture, resolve_site

IDS = torch.tensor([[1, 5, 9, 33, 8, 60], [1, 17, 3, 3, 42, 7]])


def logits(model: Any, input_ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(input_ids) if mask is None else mask
    with torch.no_grad():
        return model(input_ids=input_ids, attention_mask=mask).logits


def generate(model: Any, input_ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy continuations and the logits of each step."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, 1)


def hidden_at(model: Any, sae: Any, input_ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    site = resolve_site(model, sae.config.site)
    return capture(model, [site], input_ids=input_ids, **inputs)[site]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ends(edited: Tensor, plain: Tensor) -> Tensor:
    """Which tokens (batch, time) were edited."""
    return (edited != plain).any(-1)


# A text of four tokens and one of seven, padded to a batch.
TEXTS = ([1, 5, 9, 33], [1, 17, 3, 30, 42, 7, 8])
BATCH, MASK = torch.tensor([[0] * 3 + TEXTS[0], TEXTS[1]]), torch.tensor([[0] * 3 + [1] * 4, [1] * 7])


def check_cached_as_uncached(model: Any, atol: float = 1e-4) -> Tensor:
    """While it is steered, a model writes the same with a cache, again, and without; the logits of its steps."""
    ids, steps = generate(model)
    # Once more in the same context, after another text: what was seen before must not matter.
    logits(model, IDS.flip(0))
    assert torch.equal(generate(model)[1], steps)
    uncached_ids, uncached_steps = generate(model, use_cache=False)
    assert torch.equal(ids, uncached_ids)
    torch.testing.assert_close(steps, uncached_steps, rtol=1e-4, atol=atol)
    return steps


def check_batch_as_rows(model: Any) -> Tensor:
    """While it is steered, a model writes each text of the batch as it does alone; the logits of its steps."""
    ids, steps = generate(model, BATCH, MASK)
    for row, tokens in enumerate(TEXTS):
        alone_ids, alone_steps = generate(model, torch.tensor([tokens]))
        assert torch.equal(alone_ids[0], ids[row])
        torch.testing.assert_close(alone_steps[0], steps[row], rtol=1e-4, atol=1e-4)
    return steps

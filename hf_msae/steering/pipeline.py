"""A steered text-generation pipeline: everything transformers' own takes and gives, steered.

The steering is opened around each forward of the pipeline, in the thread that runs it, so one model serves many
pipelines and many users at once.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextGenerationPipeline

from hf_msae.devices import device_of
from hf_msae.language_models import load_language_model, model_of
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.quantization import quantization_to_load
from hf_msae.special_tokens import special_token_ids
from hf_msae.steering.gates import SteeringError
from hf_msae.steering.sampling import seeded_sampling
from hf_msae.steering.saved import Steering, load_saes_of, load_steering


class SteeredPipeline(TextGenerationPipeline):
    """`pipe(prompt)` as in transformers (batches, chats, `streamer=`, any argument of `generate`), steered.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        saes: the SAE, or several by the names that the steering's edits use; they are moved to the model's device.
        steering: what to do; a `Steering()` without edits does nothing.
        kwargs: as for `TextGenerationPipeline`.

    One argument is added to the call: `seed=`. Text is then sampled with randomness of its own (see `sampling`), so
    that it depends on nobody else; `temperature`, `top_k` and `top_p` act as usual, and each prompt gets one answer.
    `with_steering` gives the same pipeline with another steering and costs nothing: a server makes one a request.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        saes: MatryoshkaSAE | Mapping[str, MatryoshkaSAE],
        steering: Steering,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)
        named = dict(saes) if isinstance(saes, Mapping) else {"": saes}
        # The pipeline moves the model to the device that it is given, or finds.
        self.saes = {name: sae.to(device_of(self.model)) for name, sae in named.items()}  # type: ignore[arg-type]
        self.steering = steering
        self.special_ids = special_token_ids(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        name: str | None = None,
        *,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> "SteeredPipeline":
        """The steering `name` (or the only one) of a folder or Hub repo, with its SAEs and its language model.

        Args:
            source: a folder or a Hub repo.
            name: of the steering; None where there is one only.
            model: the language model or its name; by default the one that the SAE was trained on.
            tokenizer: where `model` is no name.
            subfolder: of the SAE in `source`.
            revision: branch, tag or commit of the repo.
            token: for private repos.
            kwargs: as for the pipeline.

        Raises:
            SteeringError: there is no such steering, or no language model is known.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token}
        steering = load_steering(source, name, subfolder=subfolder, **hub)
        saes = load_saes_of(steering, source, subfolder=subfolder, **hub)
        if model is None or isinstance(model, str):
            model, found = _language_model(model, saes, str(source), token)
            tokenizer = tokenizer or found
        if tokenizer is None:
            raise SteeringError(f"give the tokenizer of the {type(model).__name__}, too.")
        return cls(model, tokenizer, saes, steering, **kwargs)

    def with_steering(self, steering: Steering) -> "SteeredPipeline":
        """This pipeline, models shared, with another steering."""
        other = copy.copy(self)
        other.steering = steering
        return other

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        seed = generate_kwargs.pop("seed", None)
        if seed is not None:
            generate_kwargs = self._seeded(seed, generate_kwargs)
        with self.steering.on(self.model, self.saes, self.special_ids):
            return super()._forward(model_inputs, **generate_kwargs)

    def _seeded(self, seed: int, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same arguments, with the sampling done by `seeded_sampling`."""
        config = copy.deepcopy(generate_kwargs.pop("generation_config", None) or self.model.generation_config)
        chosen = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        chosen |= {name: generate_kwargs.pop(name) for name in list(chosen) if name in generate_kwargs}
        if chosen["temperature"] is None:
            chosen["temperature"] = self._default_generation_config.temperature
        if generate_kwargs.pop("do_sample", True) is False:
            chosen["temperature"] = 0
        for name, given in (("num_return_sequences", config.num_return_sequences), ("num_beams", config.num_beams)):
            number = generate_kwargs.get(name, given)
            if chosen["temperature"] != 0 and (number or 1) > 1:
                raise SteeringError(
                    f"seed= samples one answer to each prompt, got {name}={number}; call once for each of several "
                    "seeds, or leave the seed out."
                )
        # Whatever `generate` takes besides generation parameters (a streamer, say) is left over.
        others = config.update(**generate_kwargs, do_sample=False)
        config.temperature = config.top_k = config.top_p = None
        processors = [*others.pop("logits_processor", ()), *seeded_sampling(seed, **chosen)]
        return {**others, "generation_config": config, "logits_processor": processors}


def _language_model(
    name: str | None, saes: Mapping[str, MatryoshkaSAE], source: str, token: str | bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    configs = [sae.config for sae in saes.values()]
    revision = quantization = None
    if name is None:
        names = {model_of(config)[0] for config in configs}
        if len(names) != 1 or None in names:
            raise SteeringError(f"{source} does not say which one language model it steers; give model=.")
        name, revision = model_of(configs[0])
        quantization = quantization_to_load(configs[0])
    return load_language_model(str(name), revision=revision, token=token, needs_head=True, quantization=quantization)

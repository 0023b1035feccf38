"""Texts that a model continues from prompts, and what the model as it is thinks of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.windows import DocumentEncoder, pad_id, vocabulary
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.steering import seeded_sampling


@dataclass(frozen=True)
class Continuation:
    """A text behind its prompt.

    Args:
        ids: of the tokens that were written, until the first that ends a text.
        text: the same as text.
    """

    ids: list[int]
    text: str


class Writer:
    """Continues prompts, with randomness of its own, and measures losses under the model as it is.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        new_tokens: to write at most.
        temperature: of the sampling; 0 is greedy.
        seed: of the first prompt; each further one has the next.
        chat: whether prompts are messages to a chat model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        new_tokens: int,
        temperature: float,
        seed: int,
        chat: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.new_tokens, self.temperature, self.seed, self.chat = new_tokens, temperature, seed, chat
        self.pad_id = pad_id(tokenizer, vocabulary(model))
        self.encoder = DocumentEncoder(tokenizer, vocabulary(model))
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, as the model reads it.

        Args:
            prompt: the text, or the message to a chat model.

        Raises:
            InputError: it has no token, or the model is no chat model.
        """
        if not self.chat:
            (ids,) = self.encoder.encode_each([prompt])
            if not isinstance(ids, list) or not ids:
                raise InputError(f"The prompt {prompt!r} has no token that counts; write a word or more.")
            return ids
        if self.tokenizer.chat_template is None:
            raise InputError("chat=True needs a chat model, whose tokenizer has a chat template.")
        found = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(found)

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]], context: AbstractContextManager[None]) -> list[Continuation]:
        """What the model writes behind each prompt inside of a context.

        Args:
            prompts: token ids of each.
            context: in which the model is steered.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = device_of(self.model)
        with context:
            written = self.model.generate(  # type: ignore[operator]
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=self.pad_id,
                logits_processor=seeded_sampling(self.seed, self.temperature),
            )
        return [self._continuation(row) for row in written[:, width:].tolist()]

    def _continuation(self, ids: list[int]) -> Continuation:
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids) - 1)
        ids = ids[: end + 1]
        return Continuation(ids, str(self.tokenizer.decode(ids, skip_special_tokens=True)))

    @torch.no_grad()
    def losses(self, prompts: Sequence[list[int]], texts: Sequence[Continuation]) -> list[float]:
        """Loss of each text behind its prompt under the model as it is, in nats per token.

        Args:
            prompts: token ids of each.
            texts: behind each.
        """
        rows = [[*prompt, *text.ids] for prompt, text in zip(prompts, texts, strict=True)]
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), self.pad_id), torch.zeros(len(rows), width, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        device = device_of(self.model)
        logits = self.model(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        found: list[float] = []
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            places = slice(len(prompt) - 1, len(row) - 1)
            log_probs: Tensor = logits[number, places].float().log_softmax(-1)
            targets = torch.tensor(row[len(prompt) :], device=log_probs.device)
            found.append(-float(log_probs.gather(-1, targets[:, None]).mean()))
        return found

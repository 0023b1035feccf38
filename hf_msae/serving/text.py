"""Tokens into text, piece by piece: what is given away is never taken back, and all pieces together are the text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Enough of a prompt for a tokenizer to know whether a space precedes what follows it.
BEFORE = 8
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a letter reads of which some bytes are still to come


class TextPieces:
    """The text that follows a prompt.

    Args:
        tokenizer: The language model's.
        prompt: The prompt's tokens.
        stop: Texts before which it ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = list(prompt[-BEFORE:])
        # Tokens from `start` are decoded together; the text of those before `read` is known.
        self.start, self.read = 0, len(self.ids)
        self.held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """What the token adds to the text, as far as it is certain; sets `ended` where a text to stop at has come."""
        self.ids.append(token)
        new = self._new_text()
        return "" if new.endswith(UNFINISHED) else self._release(new)

    def end(self) -> str:
        """What is left when no more tokens come."""
        rest = self._release(self._new_text())
        left, self.held = self.held, ""
        return rest + ("" if self.ended else left)

    def _new_text(self) -> str:
        known, whole = (self._decode(self.ids[self.start : end]) for end in (self.read, None))
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str) -> str:
        if new:
            self.start, self.read = self.read, len(self.ids)
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if self.ended or found:
            self.ended, self.held = True, ""
            return text[: min(found)] if found else ""
        kept = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the beginning of a text to stop at."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)

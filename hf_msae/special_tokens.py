"""Which token ids are no words of a text."""

from transformers import PreTrainedTokenizerBase


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of BOS, EOS, padding, chat marks and whatever else a tokenizer calls special.

    Args:
        tokenizer: The language model's.
    """
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))

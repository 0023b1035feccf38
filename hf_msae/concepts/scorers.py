"""How much of a concept a text shows, from 0 to 1: by words, by a function of the user's, or by a language model.

A judge is a function from a question to an answer. It is asked for a number from 0 to 2, as AxBench asks (Wu et al.,
arXiv:2501.17148); what has no such number in it is counted as nonsense and scores nothing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.concepts.examples import ConceptError

Scorer = Callable[[str], float]
"""From a text to how much it shows the concept, 0 to 1."""
Judge = Callable[[str], str]
"""From a question to an answer."""

QUESTION = """\
Rate how clearly the following text is about or uses this concept: {concept}

Text: {text}

Answer with one number: 0 (not at all), 1 (somewhat) or 2 (clearly)."""
RATING = re.compile(r"(?<![\d.])([012])(?:\.0+)?(?!\.?\d)")
MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class WordScorer:
    """1 for a text in which one of some words stands as a whole word, in any case; 0 for others.

    Args:
        words: the words.
    """

    words: Sequence[str]

    def __call__(self, text: str) -> float:
        """The score of a text."""
        pattern = "|".join(re.escape(word.strip()) for word in self.words)
        return float(re.search(rf"(?<!\w)({pattern})(?!\w)", text, re.IGNORECASE) is not None)


@dataclass
class JudgeScorer:
    """The rating that a judge gives, halved; 0 for nonsense.

    Args:
        judge: who is asked.
        concept: what the question calls the concept.
        num_asked: how often it was asked.
        nonsense: answers without a rating.
    """

    judge: Judge
    concept: str
    num_asked: int = 0
    nonsense: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> float:
        """The score of a text."""
        answer = self.judge(QUESTION.format(concept=self.concept, text=text.strip()))
        self.num_asked += 1
        ratings = RATING.findall(answer)
        # With two different ones, as in "1 out of 2", it is not known which is meant.
        if len(set(ratings)) != 1:
            self.nonsense.append(answer)
            return 0.0
        return int(ratings[0]) / 2

    def check(self) -> str | None:
        """A sentence where some answers were nonsense. Raises ConceptError where most were."""
        if not self.nonsense:
            return None
        shown = f"such as {self.nonsense[0][:60]!r}"
        if 2 * len(self.nonsense) > self.num_asked:
            raise ConceptError(
                f"The judge answered {len(self.nonsense):,} of {self.num_asked:,} questions about {self.concept!r} "
                f"without a number from 0 to 2, {shown}; take a larger or instruction-tuned model as judge, or words."
            )
        return (
            f"{self.concept}: {len(self.nonsense):,} of the judge's {self.num_asked:,} answers had no number from 0 "
            f"to 2, {shown}; these texts count as 0."
        )


def model_judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """A chat model of transformers as a judge; it answers greedily.

    Args:
        model: in evaluation mode.
        tokenizer: its own, with a chat template.

    Raises:
        ConceptError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConceptError("A judge must be a chat model, whose tokenizer has a chat template; give another.")

    def ask(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        inputs: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        writing: Any = model
        written = writing.generate(**inputs.to(model.device), max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask


def endpoint_judge(url: str, model: str, api_key: str | None = None) -> Judge:
    """A judge behind an OpenAI-compatible endpoint, such as `hf-msae serve`.

    Args:
        url: of the endpoint, with `/v1` where it has that.
        model: the model's name there.
        api_key: where it asks for one.
    """
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=url, api_key=api_key)

    def ask(question: str) -> str:
        answer = client.chat_completion(
            [{"role": "user", "content": question}], model=model, max_tokens=MAX_ANSWER_TOKENS, temperature=0.0
        )
        return answer.choices[0].message.content or ""

    return ask

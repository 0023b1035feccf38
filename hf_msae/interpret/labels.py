"""Names for latents by a chat model, and a test of each name: can the model tell by it where the latent is active?

The explainer sees the latent's contexts with the active tokens marked, from the top and from the quantiles below, and
is asked for a short phrase. Two tests of the phrase, after delphi (Paulo et al., arXiv:2410.13928): in *detection* the
judge is shown a context without marks and asked whether the latent is active in it; half of the contexts are those of
other latents. In *fuzzing* the context is always one where the latent is active, with marks, which are on the active
tokens half of the time and on as many other tokens otherwise. A judge is asked for Yes or No and its answer is read
from the two logits, so the score is a number and not a parse. Contexts that the explainer saw are never judged.

Both are reported as AUC and as balanced accuracy at the judge's median answer; a label that says nothing has 0.5. A
label can score well and be wrong about why; a small judge scores everything near 0.5, whatever the label.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.randomness import seeded_generator
from hf_msae.errors import InputError
from hf_msae.interpret.pages import Context, Label, LatentPage

NUM_TOP_SHOWN, NUM_QUANTILE_SHOWN = 6, 4
# Each test asks about so many contexts that are right and so many that are not.
NUM_JUDGED = 10
MAX_LABEL_TOKENS = 40
MAX_LABEL_LENGTH = 120
PROMPTS_AT_ONCE = 8

EXPLAIN = """\
A unit inside a language model reacts to certain tokens. In the excerpts below, the tokens it reacts to stand between \
<< and >>. The first excerpts are those where it reacts most strongly.

{excerpts}

{promoted}What do the marked tokens have in common? Answer with one line that begins with "Label:" and gives a phrase \
of at most eight words, without quotation marks."""

DETECT = """\
A unit inside a language model reacts to: {label}

Excerpt: {excerpt}

Does the unit react to anything in this excerpt? Answer with Yes or No."""

FUZZ = """\
A unit inside a language model reacts to: {label}

Excerpt: {excerpt}

Are the tokens between << and >> those to which the unit reacts? Answer with Yes or No."""


class LabelError(InputError):
    """A model, or a latent, that no label can be made with."""


@dataclass(frozen=True)
class TestResult:
    """How well a judge tells right from wrong contexts; 0.5 is chance.

    Args:
        auc: area under the ROC curve.
        balanced_accuracy: at the median of all scores.
        num: how many contexts it judged.
    """

    __test__ = False  # its name does not make it a test of pytest's

    auc: float
    balanced_accuracy: float
    num: int


@dataclass(frozen=True)
class LabelScores:
    """Both tests of a label; None where a latent has too few contexts for one.

    Args:
        detection: telling contexts of the latent from those of others.
        fuzzing: telling rightly marked tokens from wrongly marked ones.
    """

    detection: TestResult | None
    fuzzing: TestResult | None


class Labeller:
    """Writes labels and tests them with a chat model.

    Args:
        model: any causal LM.
        tokenizer: its own, with a chat template.
        seed: of the choice of contexts and of wrong marks.

    Raises:
        LabelError: the tokenizer has no chat template, or Yes and No begin alike for it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
        if tokenizer.chat_template is None:
            raise LabelError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template; labels need a chat model, such as "
                "one whose name ends in -Instruct or -it."
            )
        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        yes, no = (_first_ids(tokenizer, words) for words in (("Yes", " Yes", "yes"), ("No", " No", "no")))
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise LabelError(f"For the tokenizer {tokenizer.name_or_path!r}, Yes and No begin with the same token.")

    def label(self, page: LatentPage) -> str:
        """A short phrase for a latent.

        Args:
            page: of the latent.

        Raises:
            LabelError: the latent never fires.
        """
        if not page.top:
            raise LabelError(f"Latent {page.latent} never fired, so that there is nothing to label.")
        prompt = explanation_prompt(page)
        inputs = self._encoded([prompt])
        settings = {"max_new_tokens": MAX_LABEL_TOKENS, "do_sample": False, "pad_token_id": self._pad_id}
        with torch.no_grad():
            written = self.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return parse_label(str(self.tokenizer.decode(written, skip_special_tokens=True)))

    def score(self, label: str, page: LatentPage, others: Sequence[LatentPage]) -> LabelScores:
        """Test a label on contexts that `label` was not shown, against contexts of other latents.

        Args:
            label: the phrase.
            page: of the latent.
            others: pages of other latents.
        """
        own = unseen_contexts(page)
        foreign = [context for other in others if other.latent != page.latent for context in unseen_contexts(other)]
        # A context of another latent may well be one of this one's, too; it is then no wrong answer.
        texts = {context.text for context in [*page.top, *page.sampled]}
        foreign = [context for context in foreign if context.text not in texts]
        right, wrong = self._draw(own, page.latent, 0), self._draw(foreign, page.latent, 1)
        detection = self._test(DETECT, label, [c.text for c in right], [c.text for c in wrong])
        marked = [context.marked_active() for context in right]
        fuzzed = [self._fuzzed(context, page.latent, index) for index, context in enumerate(right)]
        return LabelScores(detection, self._test(FUZZ, label, marked, [text for text in fuzzed if text is not None]))

    def label_and_score(self, page: LatentPage, others: Sequence[LatentPage]) -> Label:
        """A label with the AUC of both tests.

        Args:
            page: of the latent.
            others: pages of other latents.
        """
        text = self.label(page)
        scores = self.score(text, page, others)
        return Label(text, *(None if test is None else test.auc for test in (scores.detection, scores.fuzzing)))

    def probabilities(self, prompts: Sequence[str]) -> list[float]:
        """The judge's probability of Yes against No for each prompt.

        Args:
            prompts: questions.
        """
        found: list[float] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            inputs = self._encoded(prompts[start : start + PROMPTS_AT_ONCE])
            with torch.no_grad():
                logits = self.model(**inputs).logits[:, -1].float()
            difference = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
            found += difference.sigmoid().tolist()
        return found

    @property
    def _pad_id(self) -> int:
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def _encoded(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Prompts as chats, padded on the left so that the answer follows each of them."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows: Any = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        width = max(map(len, rows))
        ids = [[self._pad_id] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self.model.get_input_embeddings().weight.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def _draw(self, contexts: Sequence[Context], latent: int, purpose: int) -> list[Context]:
        generator = seeded_generator(self.seed, latent, purpose)
        order = torch.randperm(len(contexts), generator=generator)[:NUM_JUDGED].tolist()
        return [contexts[index] for index in order]

    def _fuzzed(self, context: Context, latent: int, index: int) -> str | None:
        """The text with marks on as many tokens on which the latent is silent; None where there are too few."""
        silent = [place for place, value in enumerate(context.activations) if value == 0]
        count = sum(context.active())
        if len(silent) < count:
            return None
        generator = seeded_generator(self.seed, latent, 2, index)
        chosen = {silent[i] for i in torch.randperm(len(silent), generator=generator)[:count].tolist()}
        return context.marked([place in chosen for place in range(len(context.tokens))])

    def _test(self, template: str, label: str, right: Sequence[str], wrong: Sequence[str]) -> TestResult | None:
        if len(right) < 2 or len(wrong) < 2:
            return None
        prompts = [template.format(label=label, excerpt=text.strip()) for text in [*right, *wrong]]
        answers = self.probabilities(prompts)
        yes, no = answers[: len(right)], answers[len(right) :]
        return TestResult(auc(yes, no), balanced_accuracy(yes, no), len(prompts))


def explanation_prompt(page: LatentPage) -> str:
    """What the explainer is asked about a latent.

    Args:
        page: of the latent.
    """
    excerpts = "\n".join(f"- {context.marked_active().strip()}" for context in shown_contexts(page))
    words = ", ".join(effect.token.strip() for effect in page.promoted[:8] if effect.token.strip())
    promoted = f"When it reacts, these words become likelier next: {words}.\n\n" if words else ""
    return EXPLAIN.format(excerpts=excerpts, promoted=promoted)


def shown_contexts(page: LatentPage) -> list[Context]:
    """Contexts for the explainer: the strongest, then some from evenly spaced quantiles.

    Args:
        page: of the latent.
    """
    top = list(page.top[:NUM_TOP_SHOWN])
    texts, below = {context.text for context in top}, []
    sampled = [context for context in page.sampled if context.text not in texts]
    step = max(1, len(sampled) // NUM_QUANTILE_SHOWN)
    # Every second one of them at most, so that as many are left for the tests.
    for context in sampled[:: max(2, step)][:NUM_QUANTILE_SHOWN]:
        below.append(context)
    return top + below


def unseen_contexts(page: LatentPage) -> list[Context]:
    """Contexts in which the latent is active and which the explainer is not shown, each text once.

    Args:
        page: of the latent.
    """
    seen = {context.text for context in shown_contexts(page)}
    rest = {context.text: context for context in [*page.top, *page.sampled] if context.text not in seen}
    return list(rest.values())


def parse_label(text: str) -> str:
    """The phrase in what an explainer wrote: behind the last "Label:", or else its first line.

    Args:
        text: what it wrote.

    Raises:
        LabelError: it wrote nothing.
    """
    found = re.findall(r"label\s*:\**[ \t]*(.+)", text, flags=re.IGNORECASE)
    lines = found[-1:] or [line for line in text.splitlines() if line.strip()][:1]
    label = lines[0].strip().strip("\"'`*").rstrip(".").strip() if lines else ""
    if not label:
        raise LabelError(f"The model wrote no label: {text!r}.")
    return label[:MAX_LABEL_LENGTH]


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The probability that a right answer's score exceeds a wrong one's; ties count half.

    Args:
        right: scores of right answers.
        wrong: scores of wrong ones.
    """
    wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    return wins / (len(right) * len(wrong))


def balanced_accuracy(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Mean of the shares that are judged correctly, at the median of all scores: a judge may lean to one answer.

    Args:
        right: scores of right answers.
        wrong: scores of wrong ones.
    """
    middle = torch.tensor([*right, *wrong]).double().quantile(0.5).item()
    hits = sum(score > middle for score in right) / len(right)
    return (hits + sum(score <= middle for score in wrong) / len(wrong)) / 2


def _first_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> set[int]:
    """The first token of each word, without special tokens and the unknown one."""
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    return {ids[0] for ids in encoded if ids} - {tokenizer.unk_token_id}

"""What two corpora differ in, by the latents of an SAE: how large each difference is, and whether chance could do it.

Documents are compared, not tokens: tokens of a text are no independent observations, and a thousand tokens about one
owl are one document. A latent is worth in a document what its tokens' activations are pooled to, by default their
mean, so that length alone makes none larger. Every latent that fires in enough documents is tested, all levels
together, and the false discovery rate is held over all of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.corpora.encoded import EncodedLatents
from hf_msae.corpora.encoded_files import EncodedError
from hf_msae.corpora.profiles import CorpusError, Profile, profile_of_latents, profile_of_text
from hf_msae.corpora.rank_tests import RankTests, rank_tests
from hf_msae.corpora.reading import LatentReader
from hf_msae.corpora.rows import POOLS, Pool
from hf_msae.data import Documents, as_documents, fingerprint
from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import InputError
from hf_msae.interpret import Context
from hf_msae.interpret.effects import decode_tokens
from hf_msae.interpret.pages import name_of
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE

# Of each corpus. With fewer, hardly a difference could be told from chance.
MIN_DOCUMENTS = 10
MAX_DOCUMENTS = 5000
# Of each level so many findings have examples.
NUM_WITH_EXAMPLES = 20
NUM_EXAMPLES = 3
# Tokens of an example before and behind the one on which the latent is largest; characters of one without tokens.
BEFORE, BEHIND, CHARACTERS = 16, 6, 120
# Documents that are in the median so many times as long as the other corpus's are warned of.
LENGTH_RATIO = 1.25

Corpus: TypeAlias = EncodedLatents | Documents
# What a corpus may be given as.
CorpusLike: TypeAlias = "EncodedLatents | DocumentsLike"


@dataclass(frozen=True)
class LatentDifference:
    """A latent that one corpus has more of.

    Args:
        latent: its number.
        level: the index of the first prefix that has it.
        name: from its interpretation, or else the tokens on which it is largest.
        delta: Cliff's delta from -1 to 1: how much likelier a document of B has more of it than one of A, less how
            much likelier it has less. Above 0 B has more.
        share_a: of A's documents, those in which it fires.
        share_b: of B's.
        mean_a: its pooled activation, over all documents of A.
        mean_b: over those of B.
        p: two-sided, of the rank test.
        q: the smallest false discovery rate at which it is found.
        examples: texts of the corpus that has more, the token marked on which the latent is largest.
    """

    latent: int
    level: int
    name: str
    delta: float
    share_a: float
    share_b: float
    mean_a: float
    mean_b: float
    p: float
    q: float
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class LevelDifference:
    """The latents that a level adds.

    Args:
        level: its index.
        prefix: its size.
        num_latents: that it adds.
        tested: of these, those that fire in enough documents.
        more_in_a: findings that A has more of.
        more_in_b: findings that B has more of.
    """

    level: int
    prefix: int
    num_latents: int
    tested: int
    more_in_a: int
    more_in_b: int


@dataclass(frozen=True)
class CorpusDiff:
    """What `diff_corpora` found.

    Args:
        findings: the latents that differ, the largest difference first.
        levels: how many of each level.
        tests: of every latent.
        share_a: of A's documents, those in which each latent fires, (num_latents,).
        share_b: of B's.
        facts: the corpora and how they were compared.
        warnings: what a person should know, in sentences.
    """

    findings: list[LatentDifference]
    levels: list[LevelDifference]
    tests: RankTests
    share_a: Tensor
    share_b: Tensor
    facts: dict[str, Any]
    warnings: list[str]

    def of_level(self, level: int) -> list[LatentDifference]:
        """The findings of a level, the largest difference first.

        Args:
            level: its index.
        """
        return [finding for finding in self.findings if finding.level == level]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without the latents that are no findings."""
        return {
            "facts": self.facts,
            "levels": [asdict(level) for level in self.levels],
            "findings": [asdict(finding) for finding in self.findings],
            "warnings": self.warnings,
        }


def diff_corpora(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sae: MatryoshkaSAE,
    a: CorpusLike,
    b: CorpusLike,
    *,
    names: Sequence[str] | None = None,
    pool: Pool | None = None,
    fdr: float = 0.05,
    max_documents: int = MAX_DOCUMENTS,
    document_tokens: int | None = None,
    site: str | None = None,
    context_length: int | None = None,
    packing: bool = False,
    lm_batch_size: int = 16,
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    seed: int = 0,
) -> CorpusDiff:
    """Find the latents that one corpus's documents have more of than another's.

    Args:
        model: in evaluation mode; None where both corpora are data sets of latents.
        tokenizer: its own; None where no examples are wanted of data sets of latents.
        sae: in evaluation mode, whole or truncated to a prefix; it is moved to where the model is.
        a: one corpus: `Documents`, what `as_documents` takes, or latents that `encode_dataset` wrote.
        b: the other; differences above 0 say that it has more.
        names: of all latents, such as `Interpretation.names`; by default the tokens on which they are largest.
        pool: what a latent is worth in a document: the "mean" of its activations over all tokens, their "max" or
            "sum". By default as a data set of latents is pooled, else "mean".
        fdr: of the findings, the expected share that are none, at most.
        max_documents: of each corpus, from all parts of it.
        document_tokens: only so many tokens of each document count, from its beginning; None for all.
        site: where the SAE reads; by default what its configuration records.
        context_length: tokens per window; by default what the SAE was trained with, or else 256.
        packing: whether a window may hold several documents.
        lm_batch_size: windows per forward pass.
        norm_outlier_multiple: where the SAE records no limit, activations of this many times the median norm are left
            out as outliers; None or 0 keeps all.
        seed: of the choice of documents.

    Raises:
        CorpusError: a corpus has too few different documents, or both are the same.
        EncodedError: latents are those of another SAE, language model or site, or pooled in another way.
        InputError: the SAE does not fit the model, or a number is out of its bounds.
    """
    _check_numbers(fdr, max_documents, document_tokens)
    if names is not None and len(names) < sae.config.num_latents:
        raise InputError(f"There are {len(names):,} names, and the SAE has {sae.config.num_latents:,} latents.")
    sides = [corpus if isinstance(corpus, EncodedLatents) else as_documents(corpus) for corpus in (a, b)]
    _check_apart(sides)
    pool = _pool_of(sides, pool)
    reader = None
    if model is not None and tokenizer is not None:
        reader = LatentReader(
            model,
            tokenizer,
            sae,
            site=site,
            context_length=context_length,
            packing=packing,
            lm_batch_size=lm_batch_size,
            norm_outlier_multiple=norm_outlier_multiple,
        )
    _check_encoded(sides, sae, reader)
    texts = [side for side in sides if isinstance(side, Documents)]
    if texts and reader is None:
        raise InputError("Text is read by a language model; give the model and its tokenizer, or two encoded corpora.")
    if texts and reader is not None:
        reader.find_norm_limit(texts[0])
    options: dict[str, Any] = {"pool": pool, "max_documents": max_documents, "document_tokens": document_tokens}
    profiles = []
    for called, side in zip("AB", sides, strict=True):
        if isinstance(side, EncodedLatents):
            profiles.append(profile_of_latents(side, **options, seed=seed, called=called))
        elif reader is not None:
            profiles.append(profile_of_text(reader, side, **options, seed=seed, called=called))
        _check_documents(profiles[-1], side)
    comparison = _Comparison(profiles[0], profiles[1], sae, tokenizer, names, fdr)
    warnings = comparison.warnings()
    described = {name: side.description for name, side in zip("ab", sides, strict=True)}
    facts = {**described, **comparison.facts(), "pool": pool, "fdr": fdr, "seed": seed}
    facts |= {"document_tokens": document_tokens, "prefix_sizes": list(sae.config.prefix_sizes)}
    return comparison.result(facts, warnings)


def _check_numbers(fdr: float, max_documents: int, document_tokens: int | None) -> None:
    if not 0 < fdr < 1:
        raise InputError(f"fdr is between 0 and 1, got {fdr}; 0.05 is usual.")
    if max_documents < MIN_DOCUMENTS:
        raise InputError(f"max_documents must be at least {MIN_DOCUMENTS}, got {max_documents}.")
    if document_tokens is not None and document_tokens < 1:
        raise InputError(f"document_tokens must be at least 1, got {document_tokens}.")


def _check_apart(sides: Sequence[Corpus]) -> None:
    """Raise `CorpusError` where both are the same data, before anything is read."""
    data = [side.index["data"] if isinstance(side, EncodedLatents) else fingerprint(side) for side in sides]
    if data[0] == data[1]:
        raise CorpusError(
            f"A and B are the same data ({sides[0].description}); give two corpora, such as two splits or sources."
        )


def _pool_of(sides: Sequence[Corpus], pool: Pool | None) -> Pool:
    if pool is not None and pool not in POOLS:
        raise InputError(f"pool is {', '.join(POOLS)} or None, got {pool!r}.")
    pooled: list[Any] = [side.pool for side in sides if isinstance(side, EncodedLatents) and side.pool is not None]
    return pool or (pooled[0] if pooled else "mean")


def _check_encoded(sides: Sequence[Corpus], sae: MatryoshkaSAE, reader: LatentReader | None) -> None:
    """Raise `EncodedError` where latents are of another SAE, or were read elsewhere than the other side's."""
    encoded = [side for side in sides if isinstance(side, EncodedLatents)]
    for one in encoded:
        one.check_sae(sae)
    read = [(one.index["base_model"], one.index["site"]) for one in encoded]
    if reader is not None and len(encoded) < len(sides):
        read.append((sae.config.base_model or reader.model.name_or_path, str(reader.site)))
    if len(set(read)) > 1:
        (first, at), (second, there) = read
        raise EncodedError(
            f"The corpora were read at {at} of {first or 'a model'} and at {there} of {second or 'a model'}; "
            "differences would be those of the models. Encode one of them again."
        )


def _check_documents(profile: Profile, side: Corpus) -> None:
    if len(profile) < MIN_DOCUMENTS:
        repeated = f" ({profile.num_repeated:,} more repeat them)" if profile.num_repeated else ""
        raise CorpusError(
            f"{profile.called}, {side.description}, has {len(profile)} different documents{repeated}, and "
            f"{MIN_DOCUMENTS} are needed; give more. (In a .txt file blank lines separate documents, unless a "
            "separator is given.)"
        )


class _Comparison:
    """Two profiles, compared."""

    def __init__(
        self,
        a: Profile,
        b: Profile,
        sae: MatryoshkaSAE,
        tokenizer: PreTrainedTokenizerBase | None,
        names: Sequence[str] | None,
        fdr: float,
    ) -> None:
        self.a, self.b, self.tokenizer, self.names, self.fdr = a, b, tokenizer, names, fdr
        self.sizes = list(sae.config.prefix_sizes)
        self.num_latents = self.sizes[-1]
        self.values = a.of_latents(self.num_latents), b.of_latents(self.num_latents)

    def facts(self) -> dict[str, Any]:
        profiles = (("a", self.a), ("b", self.b))
        facts: dict[str, Any] = {}
        for name, profile in profiles:
            facts |= {f"documents_{name}": len(profile), f"tokens_{name}": sum(profile.num_tokens)}
            facts |= {f"median_tokens_{name}": median(profile.num_tokens), f"repeated_{name}": profile.num_repeated}
        return facts

    def warnings(self) -> list[str]:
        """What a person should know. Raises `CorpusError` where one corpus is in the other."""
        found = []
        shared = _shared(self.a, self.b)
        if shared == min(len(self.a), len(self.b)):
            raise CorpusError(
                f"All {shared:,} documents of the smaller corpus are in the other one, too; compare what they do not "
                "share."
            )
        if shared:
            found.append(f"{shared:,} documents are in both corpora, which makes them more alike than they are.")
        lengths = [median(profile.num_tokens) for profile in (self.a, self.b)]
        if max(lengths) > LENGTH_RATIO * min(lengths):
            found.append(
                f"Documents have {lengths[0]:,.0f} tokens in the median in A and {lengths[1]:,.0f} in B. What is rare "
                "fires in more of the longer ones, and that alone is a difference of ranks: document_tokens "
                f"(--document-tokens {min(lengths):.0f}) compares equal lengths."
            )
        return found

    def result(self, facts: dict[str, Any], warnings: list[str]) -> CorpusDiff:
        tests = rank_tests(*self.values, self.num_latents)
        shares = [values.firing(self.num_latents).double() / values.num_documents for values in self.values]
        means = [values.mean(self.num_latents) for values in self.values]
        levels = torch.searchsorted(torch.tensor(self.sizes), torch.arange(self.num_latents), right=True)
        chosen = (tests.q <= self.fdr).nonzero().flatten()
        chosen = chosen[tests.delta[chosen].abs().argsort(descending=True, stable=True)]
        columns = (levels, tests.delta, *shares, *means, tests.p, tests.q)
        rows = zip(chosen.tolist(), *(column[chosen].tolist() for column in columns), strict=True)
        with_examples: Counter[int] = Counter()
        findings = []
        for latent, level, delta, *rest in rows:
            finding = LatentDifference(latent, level, "", delta, *rest)
            with_examples[level] += 1
            findings.append(self._with_words(finding, with_examples[level] <= NUM_WITH_EXAMPLES))
        return CorpusDiff(findings, self._levels(tests, levels), tests, shares[0], shares[1], facts, warnings)

    def _with_words(self, finding: LatentDifference, has_examples: bool) -> LatentDifference:
        profile = self.b if finding.delta > 0 else self.a
        name = self._name(profile, finding.latent)
        if not has_examples:
            return replace(finding, name=name)
        entries = profile.strongest(finding.latent, NUM_EXAMPLES)
        examples = tuple(text for entry in entries if (text := self._example(profile, entry)))
        return replace(finding, name=name, examples=examples)

    def _name(self, profile: Profile, latent: int) -> str:
        if self.names is not None:
            return self.names[latent]
        peaks = profile.peak_tokens(latent)
        if self.tokenizer is None or not len(peaks):
            return "–"
        ids = [token for token, _ in Counter(peaks.tolist()).most_common(4)]
        return name_of(list(dict.fromkeys(decode_tokens(self.tokenizer, ids))))

    def _example(self, profile: Profile, entry: int) -> str:
        place = profile.place(entry)
        if place is None or self.tokenizer is None:
            text = " ".join((profile.text(entry) or "").split())
            return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …"
        begin = max(0, place.index - BEFORE)
        ids = place.token_ids[begin : place.index + BEHIND + 1].tolist()
        at = place.index - begin
        values = [place.value if index == at else 0.0 for index in range(len(ids))]
        context = Context(decode_tokens(self.tokenizer, ids), values, at)
        return " ".join(context.marked_active().split())

    def _levels(self, tests: RankTests, levels: Tensor) -> list[LevelDifference]:
        found = tests.q <= self.fdr
        rows = []
        for level, size in enumerate(self.sizes):
            here = levels == level
            counts = (here, here & tests.tested, here & found & (tests.delta < 0), here & found & (tests.delta > 0))
            rows.append(LevelDifference(level, size, *(int(mask.sum()) for mask in counts)))
        return rows


def _shared(a: Profile, b: Profile) -> int:
    """How many documents are in both corpora, as far as both are known by their tokens or texts."""
    if a.token_ids and b.token_ids:
        sides = [{tuple(ids.tolist()) for ids in profile.token_ids} for profile in (a, b)]
        return len(sides[0] & sides[1])
    return len(set(a.texts) & set(b.texts))

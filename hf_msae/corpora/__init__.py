"""Whole corpora by what an SAE sees in them: data sets of latents, and what two corpora differ in.

```python
latents = encode_dataset(model, tokenizer, sae, documents, "latents", pool="mean")
found = diff_corpora(model, tokenizer, sae, latents, other_documents)
```
"""

from hf_msae.corpora.diff import CorpusDiff, LatentDifference, LevelDifference, diff_corpora
from hf_msae.corpora.diff_report import write_diff_report
from hf_msae.corpora.encoded import EncodedLatents
from hf_msae.corpora.encoded_files import EncodedError
from hf_msae.corpora.encoding import encode_dataset
from hf_msae.corpora.profiles import CorpusError
from hf_msae.corpora.rank_tests import RankTests, rank_tests

__all__ = [
    "CorpusDiff",
    "CorpusError",
    "EncodedError",
    "EncodedLatents",
    "LatentDifference",
    "LevelDifference",
    "RankTests",
    "diff_corpora",
    "encode_dataset",
    "rank_tests",
    "write_diff_report",
]

"""Whole corpora by what an SAE sees in them: data sets of latents.

```python
latents = encode_dataset(model, tokenizer, sae, documents, "latents", pool="mean")
```
"""

from hf_msae.corpora.encoded import EncodedLatents
from hf_msae.corpora.encoded_files import EncodedError
from hf_msae.corpora.encoding import encode_dataset

__all__ = [
    "EncodedError",
    "EncodedLatents",
    "encode_dataset",
]

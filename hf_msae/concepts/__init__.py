"""Latents of a concept that is given by examples, and a steering by a few of them that makes the model say it.

```python
found = find_latents(model, tokenizer, sae, positive=texts_with_owls, negative=texts_without)
save_steering(found.steering, "runs/quickstart")
```
"""

from hf_msae.concepts.examples import ConceptError
from hf_msae.concepts.finding import Finding, FoundRow, find_latents
from hf_msae.concepts.pushing import Effect, NeutralText
from hf_msae.concepts.reading import LevelReading
from hf_msae.concepts.typical import typical_scores, typical_tokens

__all__ = [
    "ConceptError",
    "Effect",
    "Finding",
    "FoundRow",
    "LevelReading",
    "NeutralText",
    "find_latents",
    "typical_scores",
    "typical_tokens",
]

"""Latents of a concept that is given by examples, and a steering by a few of them that makes the model say it.

```python
found = find_latents(model, tokenizer, sae, positive=texts_with_owls, negative=texts_without)
save_steering(found.steering, "runs/quickstart")
```
"""

from hf_msae.concepts.evaluating import METHODS, Concept, concepts_of_words, evaluate_steering
from hf_msae.concepts.examples import ConceptError
from hf_msae.concepts.finding import Finding, find_latents
from hf_msae.concepts.pushing import Effect, NeutralText
from hf_msae.concepts.reading import LevelReading
from hf_msae.concepts.results import MethodResult, SteeringEvaluation, TextScores
from hf_msae.concepts.scorers import JudgeScorer, WordScorer, endpoint_judge, model_judge
from hf_msae.concepts.searching import FoundRow
from hf_msae.concepts.sets import read_concepts
from hf_msae.concepts.steer_report import write_steering_report
from hf_msae.concepts.typical import typical_scores, typical_tokens

__all__ = [
    "METHODS",
    "Concept",
    "ConceptError",
    "Effect",
    "Finding",
    "FoundRow",
    "JudgeScorer",
    "LevelReading",
    "MethodResult",
    "NeutralText",
    "SteeringEvaluation",
    "TextScores",
    "WordScorer",
    "concepts_of_words",
    "endpoint_judge",
    "evaluate_steering",
    "find_latents",
    "model_judge",
    "read_concepts",
    "typical_scores",
    "typical_tokens",
    "write_steering_report",
]

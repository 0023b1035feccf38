"""A world of small English stories with a known tree of concepts, and the small LM trained on it.

```python
story = StoryWorld(seed=0).story(3)    # text, spans, facts, log_prob
model, tokenizer = load_story_lm()     # ships with the package
token_concepts(story.text, tokenizer)  # [(), (), ("owl", "bird", "animal"), ...]
```
"""

from hf_msae.worlds import STORIES

from .concepts import CONCEPTS, Concept, ancestors, children, depth, edges, leaves, path, roots
from .grammar import Choice, Story, StoryDocuments, StoryWorld
from .labels import concept_spans, token_concepts, word_concepts
from .lm import load_story_lm, story_lm_path

__all__ = [
    "CONCEPTS",
    "STORIES",
    "Choice",
    "Concept",
    "Story",
    "StoryDocuments",
    "StoryWorld",
    "ancestors",
    "children",
    "concept_spans",
    "depth",
    "edges",
    "leaves",
    "load_story_lm",
    "path",
    "roots",
    "story_lm_path",
    "token_concepts",
    "word_concepts",
]

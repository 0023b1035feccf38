"""Edits at a site while a language model runs or generates: by latents, by levels, by directions.

```python
with steer(model, sae, {1234: 4.0}):  # adds 4 × the largest activation seen in training, on every token
    model.generate(**inputs)
with steer(model, sae, [40], method="ablate", positions="generated"):
    ...
with steer(model, sae, {12: 2.0}, when=Gate(40, above=0.5)):  # only where latent 40 is at half its largest or more
    ...
with steer(model, sae, method="prefix", level=1):  # what the first two groups of latents keep
    ...
```
"""

from hf_msae.steering.context import steer, steer_direction, steering_context
from hf_msae.steering.directions import Direction, diff_mean, random_direction
from hf_msae.steering.edits import LatentEdit, PrefixEdit
from hf_msae.steering.exporting import check_constant, constant_shifts
from hf_msae.steering.exporting_models import export_model
from hf_msae.steering.exporting_vectors import export_gguf, export_lm_eval
from hf_msae.steering.gates import Gate, SteeringError
from hf_msae.steering.pipeline import SteeredPipeline
from hf_msae.steering.sampling import seeded_sampling
from hf_msae.steering.saved import Steering, load_steering, load_steerings, push_steering, save_steering

__all__ = [
    "Direction",
    "Gate",
    "LatentEdit",
    "PrefixEdit",
    "SteeredPipeline",
    "Steering",
    "SteeringError",
    "check_constant",
    "constant_shifts",
    "diff_mean",
    "export_gguf",
    "export_lm_eval",
    "export_model",
    "load_steering",
    "load_steerings",
    "push_steering",
    "random_direction",
    "save_steering",
    "seeded_sampling",
    "steer",
    "steer_direction",
    "steering_context",
]

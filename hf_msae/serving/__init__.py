"""An OpenAI-compatible server in which each request may steer the language model its own way.

```python
from hf_msae.serving import load_served, run_server

run_server([load_served("runs/quickstart")], port=8000)
```

A request names latents, or a saved steering, and may ask for the latents that were active on each token. Each text is
written in a thread of its own, inside a steering that no other thread is in (`hf_msae.steering.context`), so requests
that run at once never mix. A fixed number of threads write; further requests wait in line.
"""

from hf_msae.serving.app import build_app, run_server
from hf_msae.serving.limits import Limits
from hf_msae.serving.models import Served, load_served

__all__ = ["Limits", "Served", "build_app", "load_served", "run_server"]

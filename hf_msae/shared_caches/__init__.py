"""Activation caches on the Hub: pushed with a card, and streamed while a run trains on them.

```python
push_activation_cache("cache/gpt2-l8", "me/gpt2-l8-activations")
SAETrainer(None, sae, args, load_activation_cache("me/gpt2-l8-activations")).train()
```
"""

from hf_msae.shared_caches.opening import is_cache_source, load_activation_cache
from hf_msae.shared_caches.pushing import push_activation_cache

__all__ = ["is_cache_source", "load_activation_cache", "push_activation_cache"]

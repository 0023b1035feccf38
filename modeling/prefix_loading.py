# Copyright 2026 The hf_msae authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Reading the first rows of a checkpoint: `from_pretrained(..., prefix=m)`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

WEIGHTS_NAME = "model.safetensors"
# Tensors with a row per latent; the only other one is b_dec.
PER_LATENT = ("W_enc", "b_enc", "W_dec", "threshold", "max_activation", "firing_rate")
# Arguments of `from_pretrained` that say where and how a file is found.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def truncate_state(state: Mapping[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """The tensors of the first `prefix` latents."""
    return {name: tensor[:prefix] if name in PER_LATENT else tensor for name, tensor in state.items()}


def read_prefix(source: str | Path, prefix: int, **hub: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of those with a row per latent the first `prefix` rows.

    `hub` are some of `HUB_ARGUMENTS`.
    """
    with safe_open(cached_file(source, WEIGHTS_NAME, **hub), framework="pt") as file:
        keys = file.keys()
        return {key: file.get_slice(key)[:prefix] if key in PER_LATENT else file.get_tensor(key) for key in keys}

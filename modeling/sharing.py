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
"""Publishing, and other libraries' formats: what the model offers, and `hf_msae.hub` and `hf_msae.formats` do.

These files also lie beside every checkpoint, where hf_msae may not be installed, so the model cannot import the
package around it. The methods are declared here; importing hf_msae says which modules do the work.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, TypeVar

Shared = TypeVar("Shared", bound="SharingMixin")


class SharingMixin:
    """Methods of [`MatryoshkaSAE`] that need hf_msae to be installed; `ImportError` says so where it is not."""

    # The modules that do the work, imported when they are needed. hf_msae names them when it is imported.
    publishing_module: ClassVar[str | None] = None
    formats_module: ClassVar[str | None] = None
    # Held while transformers makes a model, which one thread may do at a time; hf_msae hands in its own, which is held
    # while it loads language models, too.
    loading: ClassVar[Any] = RLock()

    @staticmethod
    def _imported(module: str | None) -> Any:
        if module is None:
            raise ImportError(
                "Publishing and other libraries' formats need hf_msae itself, not only the files beside a checkpoint: "
                "pip install hf-msae, then import hf_msae."
            )
        return importlib.import_module(module)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Publish the SAE with its code and a model card.

        Several SAEs may share a repo, each in a `subfolder`; an index at the root lists them. What people wrote into
        an existing card stays.

        Args:
            repo_id: The repo, owner/name or a name of one's own; made where it is not there.
            subfolder: Folder of the SAE in the repo; the root by default.
            private: Whether a repo that is made is private. A public one that is there is refused with True.
            revision: Branch; made where it is not there.
            create_pr: Whether to open a pull request instead of committing to the branch.
            commit_message: Message of the commit.
            token: A token that may write; the one that is logged in by default.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ValueError: The push cannot work, and why.
        """
        return self._imported(self.publishing_module).push(
            self,
            repo_id,
            subfolder=subfolder,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )

    @classmethod
    def from_saelens(
        cls: type[Shared], source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
    ) -> Shared:
        """Read a SAELens checkpoint (`cfg.json`, `sae_weights.safetensors`), of its training and inference forms.

        Args:
            source: A folder, a Hub repo, or a file of weights.
            prefix_sizes: The nested sizes, only where the files do not record them.
            hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The SAE; its latents and reconstruction are those of the library for raw activations.

        Raises:
            ValueError: What has no equal here (gated, layer-normed, ...), or files that do not belong together.
        """
        return cls._imported(cls.formats_module).load_library_checkpoint(cls, source, "saelens", prefix_sizes, **hub)

    @classmethod
    def from_dictionary_learning(
        cls: type[Shared], source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
    ) -> Shared:
        """Read a dictionary_learning trainer folder (`ae.pt`, `config.json`).

        Args:
            source: A folder, a Hub repo, or a file of weights.
            prefix_sizes: The nested sizes, only where the files do not record them.
            hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The SAE; its latents and reconstruction are those of the library for raw activations.

        Raises:
            ValueError: A gated SAE, a pickle with code in it, or files that do not belong together.
        """
        return cls._imported(cls.formats_module).load_library_checkpoint(
            cls, source, "dictionary_learning", prefix_sizes, **hub
        )

    @classmethod
    def from_sparsify(
        cls: type[Shared], source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
    ) -> Shared:
        """Read a sparsify `SparseCoder` folder (`cfg.json`, `sae.safetensors`).

        Args:
            source: A folder, a Hub repo, or a file of weights.
            prefix_sizes: The nested sizes, only where the files do not record them.
            hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The SAE; its latents and reconstruction are those of the library for raw activations.

        Raises:
            ValueError: A signed or GroupMax SAE, or files that do not belong together.
        """
        return cls._imported(cls.formats_module).load_library_checkpoint(cls, source, "sparsify", prefix_sizes, **hub)

    @classmethod
    def from_gemma_scope(
        cls: type[Shared], source: str | Path, prefix_sizes: Sequence[int] | None = None, **hub: Any
    ) -> Shared:
        """Read a Gemma Scope folder (`params.npz`, or `params.safetensors` of Gemma Scope 2).

        Args:
            source: A folder, a Hub repo, or a file of weights.
            prefix_sizes: The nested sizes, only where the files do not record them.
            hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Returns:
            The SAE; its latents and reconstruction are those of the library for raw activations.

        Raises:
            ValueError: A transcoder or crosscoder, or a folder of many SAEs.
        """
        return cls._imported(cls.formats_module).load_library_checkpoint(
            cls, source, "gemma_scope", prefix_sizes, **hub
        )

    def to_saelens(self, folder: str | Path) -> None:
        """Write SAELens' inference form, which `sae_lens.SAE.load_from_disk` reads.

        What SAELens has no field for stands in its metadata, so that `from_saelens` gives this SAE again.

        Args:
            folder: The folder, absent or empty.

        Raises:
            FileExistsError: Something is in the folder.
        """
        self._imported(self.formats_module).write_library_checkpoint(self, folder, "saelens")

    def to_sparsify(self, folder: str | Path) -> None:
        """Write sparsify's form, which `sparsify.SparseCoder.load_from_disk` reads.

        What sparsify has no field for stands beside its own, so that `from_sparsify` gives this SAE again.

        Args:
            folder: The folder, absent or empty.

        Raises:
            ValueError: The activation is not `topk`: sparsify can only rank.
            FileExistsError: Something is in the folder.
        """
        self._imported(self.formats_module).write_library_checkpoint(self, folder, "sparsify")

    def to_saebench(self, prefix: int | None = None) -> Any:
        """Make an object that SAEBench's evaluations take.

        Args:
            prefix: Only the first latents; all by default.

        Returns:
            A `SAEBenchSAE` around a copy.

        Raises:
            ValueError: The language model or the site has no name in TransformerLens, which SAEBench needs.
        """
        return self._imported(self.formats_module).to_saebench(self, prefix)

"""Writes the folder with which Hugging Face's `kernels` library loads our Triton operations from the Hub.

    python scripts/kernels_package.py sae-ops

Nothing is pushed. The code is `modeling/triton_ops.py` as it is now, and hf_msae itself goes on using that file, so
training downloads no kernels. The layout is what `kernels` reads since 0.14, and what its builder writes for code that
is not compiled ahead: one build, `torch-cuda`, for every version of torch with CUDA. (`torch-universal` is the name of
older builds, whatever they ran on.) A build lies flat in its folder, with `metadata.json`, which has digests of its
files; the folder `sae_ops` in it is for loaders from before builds were flat, as the Hub's requirements ask.

A release of the kernels pushes all of it to the branch of its version, and README.md to `main` as well:

    hf upload OWNER/sae-ops sae-ops --repo-type kernel --revision v0

VERSION is what callers ask for (`get_kernel(..., version=0)`), so it rises, here and nowhere else, when a call that
worked before fails now or means something else. Faster code and more operations go to the same branch: `__version__`
and the metadata's `id` tell them apart by a digest of the code. Version 0 promises nothing, by the library's
convention; the first that does is 1.
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "modeling" / "triton_ops.py"
VERSION = 0
# The oldest `kernels` that reads repos of the type "kernel", of which this one is.
MINIMUM = "0.14.0"
NAME, MODULE, BUILD = "sae-ops", "sae_ops", "torch-cuda"
PUBLIC = ("compact_above", "compact_largest", "segment_sum", "segment_dot", "Compacted", "check_kernels")

INIT = """\
\"\"\"Sparse operations of sparse autoencoders, as Triton kernels: README.md says what each computes.\"\"\"
{place}
from .triton_ops import {names}

__version__ = "{version}"  # of the calls, and a digest of the code
__all__ = {all}
"""
# A relative import looks for modules in the package's path.
OLD_PLACE = """
from pathlib import Path

__path__ = [str(Path(__file__).parents[1])]
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
---

# Sparse operations of sparse autoencoders

With k of F latents active, a sparse autoencoder needs four operations beside its encoder's product: which
pre-activations exceed a threshold, which of these are the largest, sums of the decoder rows at these places, and dot
products with these rows. Here they are Triton kernels. They are those of
[hf_msae](https://github.com/hf-msae/hf-msae), which trains with them.

- Tables, weights and pre-activations are float32, bfloat16 or float16. Indices are int64.
- Sums are float32 whatever the input, and deterministic: nothing is added atomically, so the same input gives the same
  bits on every run.
- None has a gradient of its own. `segment_dot` is that of `segment_sum` for its weights; that for its table is
  `segment_sum` of the outer gradient, with places sorted by row.
- Inputs lie on a CUDA device. Triton compiles at the first call, for which it needs a C compiler and Python's headers;
  `check_kernels` tells whether all of it works on a machine.

```python
import torch
from kernels import get_kernel

sae_ops = get_kernel("OWNER/sae-ops", version={version}, trust_remote_code=True)

pre = torch.randn(8, 4096, device="cuda")  # 8 tokens, 4,096 latents
W_dec = torch.randn(4096, 768, device="cuda")
places, values, total = sae_ops.compact_above(pre, torch.tensor(2.5, device="cuda"))
tokens, latents = places // 4096, places % 4096
begins = torch.searchsorted(tokens, torch.arange(8, device="cuda"))
reconstruction = sae_ops.segment_sum(W_dec, latents, values, begins)
```

Version {version} of the calls; `__version__` is {full}, with a digest of the code. Apache License 2.0.

{reference}
"""


def describe(source: str) -> str:
    """What is public in a source, in Markdown: signatures and docstrings, as they stand there."""
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    sections = []
    for name in PUBLIC:
        node = nodes[name]
        call = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
        sections.append(f"## `{name}{call}`\n\n{ast.get_docstring(node)}")
    return "\n\n".join(sections)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, in base64."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def write_package(folder: Path) -> None:
    """Write everything that the repo on the Hub holds.

    Raises `FileExistsError` where the folder holds something, or is none.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there, and not an empty folder: give a new one, or empty it first.")
    build = folder / "build" / BUILD
    (build / MODULE).mkdir(parents=True)
    shutil.copyfile(CODE, build / CODE.name)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    revision = hashlib.sha256(CODE.read_bytes()).hexdigest()[:7]
    version = f"{VERSION}+{revision}"
    for path, place in ((build, ""), (build / MODULE, OLD_PLACE)):
        init = INIT.format(place=place, names=", ".join(PUBLIC), version=version, all=json.dumps(PUBLIC))
        (path / "__init__.py").write_text(init, encoding="utf-8")
    metadata = {
        "name": NAME,
        "id": f"_{MODULE}_cuda_{revision}",
        "version": VERSION,
        "kernels-minver": MINIMUM,
        "license": "Apache-2.0",
        "upstream": "https://github.com/hf-msae/hf-msae",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests(build)},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    reference = describe(CODE.read_text(encoding="utf-8"))
    card = CARD.format(version=VERSION, full=version, reference=reference)
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="a new or empty folder")
    folder = parser.parse_args().output_dir
    try:
        write_package(folder)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None
    print(f"Wrote version {VERSION} of the kernels to {folder}")


if __name__ == "__main__":
    main()

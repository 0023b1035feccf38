"""Triton's kernels as a GPU would run them: compiling needs none."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# What loads 128 bits for a thread.
WIDE_LOAD = re.compile(r"ld\.global(\.\w+)*\.v4\.b32")


def compiled(
    kernel: Any,
    types: Sequence[str],
    multiples: Collection[str],
    blocks: Mapping[str, int],
    options: Mapping[str, Any],
    capability: int,
) -> str:
    """The PTX of a kernel, whose machine code was made, too.

    Args:
        kernel: A function under `triton.jit`.
        types: Of its arguments, before those that are constants.
        multiples: Arguments that are multiples of 16, or point to such places.
        blocks: Its constants.
        options: Such as `num_warps`.
        capability: Of the GPU, 80 for Ampere.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = kernel.arg_names
    assert arguments[len(types) :] == list(blocks)
    source = ASTSource(
        kernel,
        dict(zip(arguments, [*types, *["constexpr"] * len(blocks)], strict=True)),
        constexprs={(arguments.index(block),): size for block, size in blocks.items()},
        attrs={(arguments.index(argument),): [["tt.divisibility", 16]] for argument in multiples},
    )
    code = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options)).asm
    assert code["cubin"][:4] == b"\x7fELF"
    return code["ptx"]

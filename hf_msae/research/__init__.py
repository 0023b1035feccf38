"""The papers' own instruments, and toys with known truth: research, which may change.

What stands here is not a promise as the rest of the package is: names, arguments and numbers may change with any
version. Each module names its paper. It stands above `hf_msae.evaluation`, whose metrics it adds to; nothing below
imports it.
"""

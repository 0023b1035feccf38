"""Whose checkpoints are read and written here, by the names that commands and functions take."""

# Modules of this room, in the order in which they are asked whether a checkpoint is theirs.
FORMATS = (
    "saelens",
    "dictionary_learning",
    "sparsify",
    "gemma_scope",
    "bussmann",
    "openmoss",
    "qwen_scope",
    "goodfire",
)
WRITABLE = ("saelens", "sparsify", "circuit_tracer")
# Those that name each SAE by its file, where others have a folder for each.
NAMED_BY_FILE = ("qwen_scope", "goodfire")

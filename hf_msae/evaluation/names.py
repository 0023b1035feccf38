"""What can be measured, by the names that commands and functions take."""

# In the order of the report. What they are is known to `hf_msae.evaluation.suite`.
METRICS = (
    "core",
    "geometry",
    "probing",
    "absorption",
    "erasure",
    "progressive",
    "stitching",
    "meta",
    "hedging",
)
# The others train SAEs of their own, or take long.
DEFAULT_METRICS = ("core", "geometry", "probing", "absorption", "erasure", "progressive")

"""Trees of ground-truth directions, sampled without a language model."""

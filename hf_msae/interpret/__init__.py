"""What a latent means: contexts, effects on the output, the hierarchy between levels."""

"""Other libraries' checkpoints: reading them into a `MatryoshkaSAE`, and writing what their own loaders read."""

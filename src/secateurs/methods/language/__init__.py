"""Systems that prune language models."""

"""Configs of transformers after a cut: whether one can say the result, and what is built from it."""

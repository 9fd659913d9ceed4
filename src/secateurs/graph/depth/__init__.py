"""Whole layers: which can go, what counts them, and the model without them."""

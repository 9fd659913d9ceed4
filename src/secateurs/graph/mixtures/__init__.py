"""Whole experts that Python walks through one by one: which can go, and the model without them."""

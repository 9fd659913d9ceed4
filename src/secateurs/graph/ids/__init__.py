"""Ids among a model's inputs: which there are, what holds their numbers, and their new numbers once rows have gone."""

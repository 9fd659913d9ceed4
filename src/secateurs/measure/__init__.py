"""What a model weighs, costs, takes and is worth: parameters, MACs, seconds, quality, and signs of collapse."""

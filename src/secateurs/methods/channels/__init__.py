"""Systems that prune channels, filters and heads."""

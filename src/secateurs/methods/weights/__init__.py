"""Systems that prune single weights."""

"""One script a claim. Run them as `python -m benchmarks.NAME`; each writes `benchmarks/results/NAME.json`."""

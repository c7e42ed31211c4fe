"""One dataset: features, training, MMLU, one row. Knows nothing of Ray."""

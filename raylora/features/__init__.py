"""Features of a dataset: static ones from a look at a sample, dynamic ones from a short probe."""

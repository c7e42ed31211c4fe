"""The base model: found, loaded, and run."""

"""A run of a plan: what is left of it, its tables, its end."""

"""Where files lie: places, atomic writes, the store of a run."""

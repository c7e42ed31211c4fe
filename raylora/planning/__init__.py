"""What a run will do, checked before anything starts, and what it will take."""

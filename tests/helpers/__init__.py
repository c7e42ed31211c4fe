"""What tests share: small models, chunks, runs, clusters."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
DATA = ROOT / "tests" / "helpers" / "data"

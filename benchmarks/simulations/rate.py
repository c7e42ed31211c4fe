"""A figure of a simulation: how often something happened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """How often something happened in a simulation, and how often it may."""

    what: str
    setting: str
    """The sizes and truths of the simulation."""
    rate: float
    """Between 0 and 1."""
    wanted: str
    """Such as ``0.95 or more``."""

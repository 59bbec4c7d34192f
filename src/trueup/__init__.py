"""Trueup: RLHF whole, and the proof that it worked. See ARCHITECTURE.md for the map."""

__version__ = "0.1.0"

"""Sweeps: many runs of one kind, and which of them is best."""

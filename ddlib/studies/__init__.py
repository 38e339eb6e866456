"""Experiments around distilled sets; each keeps its rows as a record."""

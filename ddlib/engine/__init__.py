"""Runs: the loop, checkpoints, records and meters."""

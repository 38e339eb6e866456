"""Datasets: where images come from, how they are decoded, cached and whitened."""

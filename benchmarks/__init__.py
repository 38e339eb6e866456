"""Speed and memory against plain loops."""


def show(row: dict) -> None:
    """Print a row of a benchmark as one line, at once."""
    words = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(", ".join(words), flush=True)

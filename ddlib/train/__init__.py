"""Training and evaluation of networks on a set."""

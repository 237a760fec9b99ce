"""Several processes on one model: how they start together."""

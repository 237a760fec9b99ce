"""The decoder: its configuration, layers and whole."""

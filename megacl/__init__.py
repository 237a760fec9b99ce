"""megacl: continual pre-training of language models, from raw text to a model that learned without forgetting."""

__version__ = "0.1.0"

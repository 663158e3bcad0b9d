"""lctrain: adapt pretrained causal language models to long contexts."""

__version__ = "0.1.0"

"""InfiniteContext: long-context language models with Multi-head Latent Attention."""

__version__ = "0.1.0"

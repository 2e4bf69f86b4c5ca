"""The label of a token that is no target. Imports no PyTorch."""

IGNORE_INDEX = -100  # PyTorch's and Hugging Face's

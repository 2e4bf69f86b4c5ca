"""Imported first by the command line, which answers help and mistakes before PyTorch is loaded.

Where this module is loaded, `import ic.model` leaves its classes, and PyTorch, for when they are
asked for. Elsewhere it registers them with transformers at once.
"""

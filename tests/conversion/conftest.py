from tests.conversion.small import trained

__all__ = ["trained"]

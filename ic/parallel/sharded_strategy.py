"""What strategies offer whose processes each hold a part of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable


@runtime_checkable
class ShardedStrategy(Protocol):
    """A strategy under which no process can run the model alone."""

    def gathered(self) -> AbstractContextManager[None]:
        """Within it, every process calls the model directly and in step with the others, without
        gradients. Parameters that are gathered stay so until its end; their owners' copies do not
        change.
        """
        ...

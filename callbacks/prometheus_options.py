"""What the Prometheus exporter is asked. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PrometheusOptions:
    """Where the run's metrics can be read.

    Attributes:
        host: address to listen at; the default answers this machine alone. 0.0.0.0 answers others.
        port: port of the node's first process, the next has the next; 0 takes any free port. null
            opens none, which leaves the textfile.
        targets: folder in which each process names its address as long as it trains, in the form of
            Prometheus's `file_sd_configs`; null for none.
        textfile: folder of node_exporter's textfile collector, on each node; null for none.
        textfile_every_s: seconds between two writes of it.
    """

    host: str = "127.0.0.1"
    port: int | None = 0
    targets: str | None = None
    textfile: str | None = None
    textfile_every_s: float = 15.0

    def __post_init__(self) -> None:
        key = "callbacks.prometheus"
        if not self.host:
            raise ValueError(f"{key}.host={self.host!r}: give an address, such as 127.0.0.1")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ValueError(
                f"{key}.port={self.port}: must be from 1 to 65535, 0 for any free port, or null"
            )
        if self.port is None and self.textfile is None:
            raise ValueError(
                f"{key}.port=null: nothing could be read; give {key}.textfile a folder, or port a "
                "number"
            )
        if self.port is None and self.targets is not None:
            raise ValueError(
                f"{key}.targets={self.targets}: without a port there is no address to name; set "
                f"{key}.port=0, or targets=null"
            )
        if not self.textfile_every_s > 0:
            raise ValueError(f"{key}.textfile_every_s={self.textfile_every_s}: must be above 0")

"""What the verbs of `ab` are asked. Imports no PyTorch: help and refusals come at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ic.serving.ab.split import check_weights
from ic.serving.limits import check_limits, check_seconds

# A name of Kubernetes, which the chart's versions have; it stands in metrics and headers.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def check_level(name: str, value: float) -> None:
    """Raises:
    ValueError: it is no level of a test.
    """
    if not 0 < value <= 0.5:
        raise ValueError(f"{name}={value}: must be above 0 and at most 0.5")


@dataclass
class VersionOptions:
    """A version of the model, and who serves it.

    Attributes:
        urls: of its servers, such as http://127.0.0.1:8001, without /v1.
        weight: its share of the users in per cent; those of all versions sum to 100.

    Raises:
        ValueError: no address, or one that is none.
    """

    urls: list[str] = field(default_factory=list)
    weight: float = 0.0

    def __post_init__(self) -> None:
        if any("@" in url for url in self.urls):
            raise ValueError("urls: an address holds a password; clients send their token")
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ValueError(f"urls={self.urls}: give each server of a version once, at least one")
        for url in self.urls:
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:  # a port that is no number, or above 65535
                usable = False
            if not usable or parts.query:
                raise ValueError(
                    f"urls: {url!r} is no address; give one such as http://127.0.0.1:8001"
                )
            if parts.path.rstrip("/").endswith("/v1"):
                raise ValueError(f"urls: {url!r} ends in /v1, which clients add; leave it out")


def _check_servers(versions: Mapping[str, VersionOptions]) -> None:
    """Raises:
    ValueError: a server is given to two versions, which would be compared with themselves.
    """
    owners: dict[str, str] = {}
    for name, version in versions.items():
        for url in version.urls:
            other = owners.setdefault(url.rstrip("/"), name)
            if other != name:
                raise ValueError(
                    f"versions: {other} and {name} both have the server {url}; a server serves one "
                    "version, so give each its own"
                )


@dataclass
class GuardrailOptions:
    """When a version other than the control is rolled back.

    Attributes:
        max_error_share: share of its requests that a version may leave unanswered; null asks for
            none.
        max_slow_share: share of them whose first byte may come later than `slow_s`; null asks for
            none.
        slow_s: seconds to the first byte from which on an answer is slow. Answers that are not
            streamed have it at their end.
        level: probability that a version which keeps to the limits is ever rolled back.

    Raises:
        ValueError: a value out of its range.
    """

    max_error_share: float | None = 0.05
    max_slow_share: float | None = 0.1
    slow_s: float = 30.0
    level: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_error_share", "max_slow_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"guardrail.{name}={value}: must be above 0 and below 1, or null")
        check_level("guardrail.level", self.level)
        check_seconds("guardrail", self)


@dataclass
class HealthOptions:
    """When a server is left alone.

    Attributes:
        path: what is asked of a server; any status below 400 will do.
        every_s: seconds between two such questions.
        timeout_s: seconds that it has for the answer. After two in a row that fail nothing is sent
            to it, until one succeeds.
        eject_after: requests in a row that a server fails before it is left alone for `eject_s`
            seconds, though its health be good. After that it gets one request at a time, until one
            succeeds; if it fails, the time doubles.
        eject_s: of the first time.
        longest_eject_s: to which the time doubles at most.

    Raises:
        ValueError: a value out of its range.
    """

    path: str = "/health"
    every_s: float = 5.0
    timeout_s: float = 2.0
    eject_after: int = 3
    eject_s: float = 5.0
    longest_eject_s: float = 300.0

    def __post_init__(self) -> None:
        check_seconds("health", self)
        if not self.path.startswith("/"):
            raise ValueError(f"health.path={self.path!r}: must begin with /")
        if self.eject_after < 1:
            raise ValueError(f"health.eject_after={self.eject_after}: must be at least 1")
        if self.longest_eject_s < self.eject_s:
            raise ValueError(
                f"health.longest_eject_s={self.longest_eject_s}: must be at least health.eject_s="
                f"{self.eject_s}"
            )


@dataclass
class RouterLimits:
    """What the router bears of clients and servers.

    Attributes:
        body_bytes: largest body of a request.
        requests: most requests in work at once; further ones get status 429.
        read_s: seconds in which a request must have arrived whole.
        connect_s: seconds that a connection to a server may take.
        first_byte_s: seconds that a server may take to the first byte, before another one is asked.
        answer_s: seconds after which an answer that is not finished is given up.
        write_s: seconds that a client may leave what was sent to it unread.
        drain_s: seconds that answers in work may take after SIGTERM.

    Raises:
        ValueError: a value out of its range.
    """

    body_bytes: int = 16 * 2**20
    requests: int = 1024
    read_s: float = 60.0
    connect_s: float = 5.0
    first_byte_s: float = 600.0
    answer_s: float = 3600.0
    write_s: float = 60.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        check_limits("limits", self)


@dataclass
class RouteOptions:
    """The verb `ab route`: a router that gives each user one version of a model.

    Attributes:
        versions: by name, each with `urls` and `weight`.
        control: the version that others are held against, and that their users get when they are
            rolled back; null is the first.
        experiment: its name. Another one deals the users out anew.
        user_header: header that names the user; without it the field `user` of the body does.
        host: address to listen on. Any but a loopback address needs a token.
        port: TCP port; 0 takes a free one, which the first line names.
        token_env: environment variable that holds the token which clients must send, and which the
            servers get from them. Where it is not set, none is asked for.
        token_file: file that holds the token, instead of the variable.
        output: folder of the log and of the split; by default `runs/ab/<experiment>`.
        guardrail: when a version is rolled back.
        health: when a server is left alone.
        limits: what is borne of clients and servers.

    Raises:
        ValueError: a value out of its range, or weights that do not sum to 100.
    """

    versions: dict[str, VersionOptions] = field(default_factory=dict)
    control: str | None = None
    experiment: str = "default"
    user_header: str = "x-user-id"
    host: str = "127.0.0.1"
    port: int = 8080
    token_env: str = "IC_SERVE_TOKEN"
    token_file: str | None = None
    output: str | None = None
    guardrail: GuardrailOptions = field(default_factory=GuardrailOptions)
    health: HealthOptions = field(default_factory=HealthOptions)
    limits: RouterLimits = field(default_factory=RouterLimits)

    def __post_init__(self) -> None:
        for name in self.versions:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"versions: {name!r} is no name; use small letters, digits and hyphens"
                )
        check_weights("versions", self.weights)
        _check_servers(self.versions)
        if self.control is not None and self.control not in self.versions:
            raise ValueError(
                f"control={self.control}: is no version; choose one of {', '.join(self.versions)}"
            )
        if not self.experiment or "/" in self.experiment:
            raise ValueError(f"experiment={self.experiment!r}: give a name without a slash")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port}: must be from 0 (a free one) to {2**16 - 1}")
        for name in ("host", "user_header", "token_env"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: leave it out for its default")

    @property
    def weights(self) -> dict[str, float]:
        """Of the versions, in per cent."""
        return {name: version.weight for name, version in self.versions.items()}

    @property
    def the_control(self) -> str:
        """The control's name."""
        return self.control or next(iter(self.versions))

    @property
    def folder(self) -> str:
        """Where the experiment's files go."""
        return self.output or f"runs/ab/{self.experiment}"

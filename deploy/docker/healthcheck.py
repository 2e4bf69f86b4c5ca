"""What HEALTHCHECK of the images asks, with nothing but Python's own modules.

    python -IS healthcheck.py serving    the server takes requests (GET /health)
    python -IS healthcheck.py training   something below runs/ was written lately

IC_HEALTH_URL is another address than the server's default, IC_HEALTH_AGE_S another age in seconds
than half an hour. The exit code is 0 or 1.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from pathlib import Path


def serving() -> str:
    """Nothing, or what is wrong."""
    url = os.environ.get("IC_HEALTH_URL", "http://127.0.0.1:8000/health")
    # A proxy of the environment is for what lies outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=4).close()
    except OSError as error:
        return f"{url}: {error}"
    return ""


def training() -> str:
    """Nothing, or what is wrong."""
    limit = float(os.environ.get("IC_HEALTH_AGE_S", "1800"))
    runs = Path("/workspace/runs")
    written = [path.stat().st_mtime for path in runs.rglob("*") if path.is_file()]
    if not written:
        return f"{runs} holds no file"
    age = time.time() - max(written)
    if age > limit:
        return f"{runs}: nothing was written for {age:.0f} s, limit {limit:.0f} s"
    return ""


if __name__ == "__main__":
    wrong = {"serving": serving, "training": training}[sys.argv[1]]()
    print(wrong or "healthy")
    sys.exit(bool(wrong))

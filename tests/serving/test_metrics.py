"""Every metric counts what its name says."""

from __future__ import annotations

from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.served import NAME, PAGE_TOKENS, served

PROMPT = "x" * (PAGE_TOKENS * 4 + 1)


def test_the_counts_are_those_of_the_requests(folder: Path) -> None:
    # A batch of one and a cache in which two long answers have no room.
    with served(folder, cache_tokens=512, max_batch=2) as found:
        before = found.metrics()
        assert before["ic:cache_pages_total"] == 512 / PAGE_TOKENS
        for tokens in (5, 7):
            answer = found.complete(prompt=PROMPT, max_tokens=tokens, ignore_eos=True).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) - 1
        found.complete(prompt=PROMPT, stop=["\N{SNOWMAN}"], max_tokens=3, ignore_eos=True, n=2)
        found.complete(temperature=9)
        after = found.wait_until_idle()
        text = httpx2.get(f"{found.url}/metrics").text

        assert after["ic:prompt_tokens_total"] == 4 * len(PROMPT)
        assert after["ic:prefix_cache_queries_total"] == 4 * len(PROMPT)
        assert after["ic:prefix_cache_hits_total"] == 3 * (len(PROMPT) - 1)
        assert after["ic:generation_tokens_total"] == 5 + 7 + 2 * 3
        assert after['ic:request_success_total{finished_reason="length"}'] == 4
        assert after["ic:time_to_first_token_seconds_count"] == 4
        assert after["ic:inter_token_latency_seconds_count"] == 4 + 6 + 2 * 2
        assert after["ic:e2e_request_latency_seconds_count"] == 4
        assert (
            0
            < after["ic:time_to_first_token_seconds_sum"]
            < after["ic:e2e_request_latency_seconds_sum"]
        )
        route = 'ic:http_requests_total{route="/v1/completions",status='
        assert (after[f'{route}"200"}}'], after[f'{route}"400"}}']) == (3, 1)
        assert after["ic:kv_cache_usage_perc"] == after["ic:cache_pages_used"] == 0
        assert after["ic:cache_pages_cached"] > 0
        # Prometheus's own parser reads it, and each metric says what it means.
        families = list(text_string_to_metric_families(text))
        assert all(family.documentation for family in families)
        # Each sample has vLLM's labels, by which dashboards and scalers find it.
        ours = [
            (s.labels.get("model_name"), s.labels.get("engine"))
            for f in families
            for s in f.samples
        ]
        assert set(ours) == {(NAME, "0")}

        # Two answers of 300 tokens do not fit: one waits for the other, again and again.
        long = [f"{i}{PROMPT}" for i in range(2)]
        response = found.complete(prompt=long, max_tokens=300, ignore_eos=True)
        assert response.json()["usage"]["completion_tokens"] == 600
        assert found.wait_until_idle()["ic:num_preemptions_total"] > 0


def test_unknown_routes_are_counted_together(folder: Path) -> None:
    with served(folder) as found:
        for route in ("/a", "/b", "/v1/models/x"):
            httpx2.get(f"{found.url}{route}")
        assert found.metrics()['ic:http_requests_total{route="other",status="404"}'] == 3

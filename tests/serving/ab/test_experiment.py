"""An experiment as a whole: rolled back, changed by hand, begun again, analysed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ic.errors import UsageError
from ic.files.json_lines import append_rows, read_rows
from ic.serving.ab.experiment import Experiment
from ic.serving.ab.options import GuardrailOptions, RouteOptions, VersionOptions
from ic.serving.ab.split import slot_of

Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
ROUTE = "versions={a:{urls:[http://127.0.0.1:1],weight:%s},b:{urls:[http://127.0.0.1:2],weight:%s}}"


def options(folder: Path, b: float = 50.0, **guardrail: Any) -> RouteOptions:
    return RouteOptions(
        versions={
            "a": VersionOptions(["http://127.0.0.1:1"], 100 - b),
            "b": VersionOptions(["http://127.0.0.1:2"], b),
        },
        output=str(folder),
        guardrail=GuardrailOptions(**guardrail),
    )


def test_errors_and_slow_answers_roll_a_version_back(tmp_path: Path, capsys: Capture) -> None:
    for name, bad in (
        ("errors", {"failed": True, "slow": None}),
        ("slow answers", {"failed": None, "slow": True}),
    ):
        found = Experiment(options(tmp_path / name))
        for _ in range(60):
            found.observe("a", failed=False, slow=False)
            found.observe("b", failed=False, slow=False)
        assert found.split.weights == {"a": 50, "b": 50}
        counted = 0
        while found.split.weights["b"]:
            counted += 1
            found.observe("b", **bad)
        assert counted <= 15
        assert found.split.weights == {"a": 100, "b": 0}
        assert found.rollbacks == {"a": 0, "b": 1}
        assert (
            f"b is rolled back: {counted} {name} in {60 + counted} requests"
            in capsys.readouterr().err
        )
        assert name in read_rows(found.folder.outcomes)[-1]["rolled_back"]["b"]


def test_the_control_is_never_rolled_back_nor_others_where_it_fails_as_well(tmp_path: Path) -> None:
    found = Experiment(options(tmp_path))
    for _ in range(500):
        found.observe("a", failed=True, slow=True)
        found.observe("b", failed=True, slow=True)
    assert found.split.weights == {"a": 50, "b": 50}
    for _ in range(60):  # the control is in order again, and going back to it would help
        found.observe("a", failed=False, slow=False)
    found.observe("b", failed=True, slow=True)
    assert found.split.weights == {"a": 100, "b": 0}


def test_a_rollback_outlives_the_router(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    found = Experiment(options(tmp_path))
    while found.split.weights["b"]:
        found.observe("b", failed=True, slow=None)
    assert Experiment(options(tmp_path)).split.weights == {"a": 100, "b": 0}
    with pytest.raises(UsageError, match="b was rolled back"):
        Experiment(options(tmp_path, b=10.0))
    assert ic("ab", str(tmp_path), "weights={a:90,b:10}") == 2
    assert "b was rolled back" in capsys.readouterr().err
    assert Experiment(options(tmp_path)).split.weights == {"a": 100, "b": 0}
    # By hand, with a router that runs: it follows, and its tests begin anew.
    capsys.readouterr()
    assert ic("ab", str(tmp_path), "weights={a:90,b:10}", "again=true") == 0
    assert capsys.readouterr().out == "a: 90 %\nb: 10 %\n"
    found.follow_file()
    assert found.split.weights == {"a": 90, "b": 10}
    found.observe("b", failed=True, slow=None)
    assert found.split.weights == {"a": 90, "b": 10}
    assert read_rows(found.folder.outcomes)[-1]["why"] == "changed by hand"


def test_what_a_folder_holds_is_not_mixed_up(tmp_path: Path) -> None:
    Experiment(options(tmp_path))
    other = options(tmp_path)
    other.experiment = "another"
    with pytest.raises(UsageError, match="holds the experiment default of a, b"):
        Experiment(other)
    (tmp_path / "split.json").write_text('{"experiment": "default"}')
    with pytest.raises(UsageError, match="is no split of a router"):
        Experiment(options(tmp_path))


def test_three_versions_keep_their_users_over_a_restart(tmp_path: Path) -> None:
    def three(*weights: float) -> RouteOptions:
        versions = {
            name: VersionOptions([f"http://127.0.0.1:{n + 1}"], weight)
            for n, (name, weight) in enumerate(zip("abc", weights, strict=True))
        }
        return RouteOptions(versions=versions, output=str(tmp_path))

    users = [f"user {n}" for n in range(3000)]
    before = Experiment(three(50, 30, 20))
    had = {user: before.version_of(user) for user in users}
    after = Experiment(three(40, 30, 30))
    assert Experiment(three(40, 30, 30)).split == after.split
    moved = [user for user in users if after.version_of(user) != had[user]]
    assert {had[user] for user in moved} == {"a"}
    assert len(moved) == sum(
        after.split.version_at(slot_of("default", user)) == "c" != had[user] for user in users
    )
    assert 200 < len(moved) < 400  # of 300 that are expected


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((ROUTE % (90, 20),), "versions: a 90, b 20 sum to 110 per cent; they must sum to 100"),
        ((ROUTE % (50, 50), "control=c"), "control=c: is no version; choose one of a, b"),
        ((ROUTE.replace("a:{", "A_b:{") % (50, 50),), "'A_b' is no name"),
        ((ROUTE.replace(":2]", ":2/v1]") % (50, 50),), "ends in /v1, which clients add"),
        ((ROUTE.replace("http", "ftp") % (50, 50),), "is no address"),
        ((ROUTE.replace(":2]", ":99999]") % (50, 50),), "is no address"),
        ((ROUTE.replace(":2]", ":1/]") % (50, 50),), "a and b both have the server"),
        ((ROUTE % (50, 50), "host=0.0.0.0"), "needs a token: set the environment variable"),
        ((ROUTE % (50, 50), "guardrail.max_error_share=1.5"), "must be above 0 and below 1"),
        ((ROUTE % (50, 50), "health.eject_s=900"), "health.longest_eject_s=300"),
        ((), "give at least two versions"),
    ],
)
def test_bad_routes(
    ic: Run, tmp_path: Path, capsys: Capture, args: tuple[str, ...], says: str
) -> None:
    assert ic("ab", "route", *args, f"output={tmp_path / 'out'}") == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_passwords_of_addresses_are_not_shown(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    for url in ("http://me:hidden@h:1", "me:hidden@h:1", "ftp://me:hidden@h", "http://hidden@h:x"):
        assert ic("ab", "route", f"versions={{a:{{urls:['{url}','{url}'],weight:100}}}}") == 2
        told = capsys.readouterr().err
        assert "an address holds a password" in told
        assert "hidden" not in told


@pytest.mark.slow
def test_weights_of_the_chart_and_of_a_route(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    values, route, output = (tmp_path / name for name in ("values.yaml", "route.yaml", "new.yaml"))
    versions = {"stable": {"source": "x", "weight": 95}, "canary": {"source": "y", "weight": 5}}
    values.write_text(yaml.safe_dump({"modelName": "m", "versions": versions}))
    assert ic("ab", str(values)) == 0
    assert capsys.readouterr().out == "canary: 5 %\nstable: 95 %\n"
    change = ("weights={stable:80,canary:20}", f"output={output}")
    assert ic("ab", str(values), *change) == 0
    wanted = {"versions": {"stable": {"weight": 80}, "canary": {"weight": 20}}}
    assert yaml.safe_load(output.read_text()) == wanted

    named = [
        {
            "requestHeaderModifier": {
                "set": [{"name": "x-infinite-context-version", "value": "canary"}]
            }
        }
    ]
    references = [
        {"name": "stable", "port": 8000, "weight": 95},
        {"name": "keda", "weight": 5, "filters": named},
    ]
    manifest = {
        "kind": "HTTPRoute",
        "spec": {"hostnames": ["h"], "rules": [{"backendRefs": references}]},
    }
    route.write_text(yaml.safe_dump(manifest))
    assert ic("ab", str(route), *change) == 0
    written = yaml.safe_load(output.read_text())
    assert [each.pop("weight") for each in written["spec"]["rules"][0]["backendRefs"]] == [80, 20]
    for each in references:
        del each["weight"]
    assert written == manifest

    before = output.read_text()
    for file, given, says in (
        (values, "weights={stable:80,canary:30}", "sum to 110 per cent"),
        (values, "weights={stable:80,other:20}", "give each of them a weight"),
        (values, "weights={stable:79.5,canary:20.5}", "take whole numbers"),
        (tmp_path / "none.yaml", "weights={stable:80,canary:20}", "no such file"),
    ):
        assert ic("ab", str(file), given, f"output={output}") == 2
        assert says in capsys.readouterr().err
    versions["canary"]["weight"] = 6
    values.write_text(yaml.safe_dump({"versions": versions}))
    assert ic("ab", str(values)) == 2
    assert "sum to 101 per cent" in capsys.readouterr().err
    assert output.read_text() == before


def rows(better: float, users: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """A log in which b answers in `better` times the seconds of a, and both fail alike."""
    draw = np.random.default_rng(seed)
    found: list[dict[str, Any]] = [{"what": "begin", "time": 0, "control": "a", "weights": {}}]
    for n in range(3 * users):
        user, id = int(draw.integers(users)), f"{n:032x}"
        version = "ab"[user % 2]
        seconds = float(draw.lognormal(0, 0.3)) * (better if version == "b" else 1)
        ok = bool(draw.random() < 0.95)
        found.append(
            {"what": "outcome", "time": n, "id": id, "user": f"u{user}", "version": version, "served_by": version,
             "ok": ok, "status": 200 if ok else 500, "first_byte_s": seconds / 2, "seconds": seconds}
        )  # fmt: skip
        if n % 2:
            found.append(
                {"what": "feedback", "time": n, "id": id, "score": float(draw.random() < 0.6)}
            )
    found.append({**found[1], "ok": None, "status": 400})
    return found


def test_a_report_in_words(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    append_rows(tmp_path / "outcomes.jsonl", rows(better=0.7))
    assert ic("ab", "analyse", str(tmp_path)) == 0
    said = " ".join(capsys.readouterr().out.split())
    report = (tmp_path / "report.md").read_text()
    for text in (said, report):
        assert "b is better than a: it sends its first byte sooner" in text
        assert "b is better than a: it takes less time for a whole answer" in text
        assert "b, answered: no difference from a can be seen" in text
        assert "b, score: no difference from a can be seen" in text
        assert "1 request says nothing of a version" in text
    result = json.loads((tmp_path / "report.json").read_text())
    of = {row["measure"]: row for row in result["rows"]}
    first = of["first byte"]
    assert first["low"] < np.log(0.7) < first["high"] < 0
    assert (first["better"], of["answered"]["better"], first["level"]) == (True, None, 0.05 / 4)
    assert first["requests"] + first["control_requests"] == sum(
        row.get("ok") is True for row in rows(better=0.7)
    )
    assert (tmp_path / "report.png").stat().st_size > 10_000
    # The other way round.
    other = tmp_path / "other"
    assert ic("ab", "analyse", str(tmp_path), "control=b", f"output={other}") == 0
    assert "a is worse than b: it sends its first byte later" in (other / "report.md").read_text()


def test_too_early_to_tell(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    append_rows(tmp_path / "outcomes.jsonl", rows(better=0.5, users=40))
    assert ic("ab", "analyse", str(tmp_path)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("too early to tell") == 4


def test_logs_that_cannot_be_read(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "outcomes.jsonl"
    good = rows(better=1, users=20)
    for content, args, says in (
        (None, (), "no such file"),
        (good[:1], (), "holds no outcome yet"),
        (good, ("control=c",), "control=c: has no outcome"),
        ([{"what": "outcome", "time": 1}], (), "line 1: an outcome without id, user"),
        ([*good, {"what": "feedback", "id": "x", "score": 7}], (), "score=7 must be from 0 to 1"),
        (good[1:2], (), "names no control"),
        ([{"x": 1}], (), "is none of this log's"),
        ([{**good[1], "version": {"a": 1}}], (), "line 1: version={'a': 1} must be a text"),
        ([{**good[1], "user": None}], (), "user=None must be a text"),
        ([{**good[1], "ok": "yes"}], (), "ok='yes' must be true, false or null"),
        ([{**good[1], "seconds": "soon"}], (), "seconds='soon' must be a number of seconds"),
        ([{**good[1], "first_byte_s": -1}], (), "first_byte_s=-1 must be a number of seconds"),
        ([{"what": "feedback", "id": ["x"], "score": 1}], (), "id=['x'] must be a text"),
        ([{"what": "weights", "rolled_back": ["b"]}], (), "rolled_back=['b'] must be an object"),
    ):
        log.unlink(missing_ok=True)
        if content is not None:
            append_rows(log, content)
        assert ic("ab", "analyse", str(tmp_path), *args) == 2
        assert says in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.name.startswith("report")] == []


def test_simulate(ic: Run, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "sim.json"
    args = ("experiments=20", "requests=400", "users=200", "outcomes=50", "failing=[1.0]")
    assert ic("ab", "simulate", *args, f"output={output}") == 0
    kinds = [row["what"] for row in json.loads(output.read_text())["rows"]]
    assert kinds == ["difference", "difference", "guardrail"]
    assert "100.0 %" in capsys.readouterr().out
    assert ic("ab", "simulate", "differences=[0.5]", "base=0.9") == 2
    assert "it must stay between 0 and 1" in capsys.readouterr().err

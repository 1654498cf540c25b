"""Jobs of a cluster: each is done once even if workers die, and failures are reported at the end."""

from __future__ import annotations

import importlib
import re
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from ran import Run
from short_run import Recorder

from effnet.cluster import AHEAD, ATTEMPTS, Cluster, ClusterJob, _run, _same_sigterm
from effnet.errors import ArgumentError, ClusterError, DataError, EffnetError
from effnet.version import __version__


class DiedError(Exception):
    """Of a worker."""


class Pretended(Cluster):
    """Runs jobs here, at once."""

    slots = 3
    lost = (DiedError,)

    def __init__(self) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(_run(__version__, function, *arguments))
        except DiedError as error:
            future.set_exception(error)
        return future


def jobs(count: int) -> list[ClusterJob]:
    return [(f"job {number}", (number,)) for number in range(count)]


def test_jobs_are_drawn_as_there_is_room() -> None:
    drawn = list[str]()

    def draw() -> Iterator[ClusterJob]:
        for job in jobs(99):
            drawn.append(job[0])
            yield job

    answers = Pretended().run(lambda number: number, draw())
    first = next(answers)
    assert len(drawn) == AHEAD * Pretended.slots
    assert {first, *answers} == {(name, number) for name, (number,) in jobs(99)}


def test_a_job_whose_worker_dies_is_done_again() -> None:
    tries, progress = Counter[int](), Recorder()

    def work(number: int) -> int:
        tries[number] += 1
        if number % 7 == 0 and tries[number] < ATTEMPTS:
            raise DiedError
        return 2 * number

    found = list(Pretended().run(work, jobs(20), progress))
    assert sorted(found) == sorted((name, 2 * number) for name, (number,) in jobs(20))
    assert tries == {number: ATTEMPTS if number % 7 == 0 else 1 for number in range(20)}
    assert progress.messages.count("job 7: its worker or machine died; it runs again") == ATTEMPTS - 1


def test_what_no_worker_survives_is_told_when_the_others_are_done() -> None:
    def work(number: int) -> int:
        if number in (0, 5):
            raise DiedError("signal 9")
        return number

    found = list[tuple[str, int]]()
    with pytest.raises(ClusterError, match=rf"job \d: its worker died {ATTEMPTS} times, and those of 1 more.*signal 9"):
        found.extend(Pretended().run(work, jobs(8)))
    assert sorted(number for _, number in found) == [1, 2, 3, 4, 6, 7]


def test_an_error_of_effnet_ends_it_and_any_other_is_not_hidden() -> None:
    def broken(number: int) -> int:
        raise DataError("a.png cannot be read")

    with pytest.raises(DataError, match=r"a\.png"):
        list(Pretended().run(broken, jobs(5)))
    with pytest.raises(ZeroDivisionError):
        list(Pretended().run(lambda number: 1 // number, jobs(5)))


def test_a_machine_with_another_effnet_does_nothing() -> None:
    outcome = _run("0.0.1", lambda: pytest.fail("it ran"))
    assert isinstance(outcome, EffnetError)
    assert f"has effnet {__version__}, not 0.0.1 as here" in str(outcome)


@pytest.mark.filterwarnings("ignore")
def test_an_address_that_ray_refuses() -> None:
    with pytest.raises(ArgumentError, match=r"`ray` \(='nonsense://'\) cannot be reached"):
        Cluster("nonsense://")
    with pytest.raises(ArgumentError, match="must be auto, local, HOST:PORT"):
        Cluster("")
    assert not importlib.import_module("ray").is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", f"{'a' * 70}:1"])
def test_an_address_where_nobody_listens_is_refused_before_ray_waits_for_minutes(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("waits for minutes"))
    with pytest.raises(ArgumentError, match=rf"`ray` \(='{re.escape(address)}'\) cannot be reached: .") as refused:
        Cluster(address)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ArgumentError, match=rf"`ray` \(='auto'\) cannot be reached: {re.escape(address)}: ."):
        Cluster("auto")


def test_what_listens_and_is_no_ray_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster.")

    monkeypatch.setattr("ray.init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ArgumentError, match=r"Failed to connect to Ray cluster\. Something listens .* a token\.$"):
            Cluster(address)
    with pytest.raises(ArgumentError, match=r"cannot be reached: Failed to connect to Ray cluster\.$"):
        Cluster("auto")


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "nowhere", "--macs", "1M", "--out", "out"),
        ("search", "nowhere", "--out", "out"),
        ("predict", "nowhere", "--model", "nothing", "--out", "out"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_refuses_a_wrong_address_before_anything_else(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before it looks at the data and the model, which are wrong, too."""
    monkeypatch.chdir(tmp_path)
    done = Run(capsys, *words, "--ray", "127.0.0.1:1")
    assert done.code == 2
    assert "`ray` (='127.0.0.1:1') cannot be reached" in done.err
    assert len(done.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_handler_that_python_did_not_set_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with _same_sigterm():
        pass

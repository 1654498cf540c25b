"""The clock: statistics against formulas, rounds that take turns, threads that come back. No test asserts a time."""

import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import effnet
from effnet.errors import ArgumentError
from effnet.machine import Machine
from effnet.metrics import timing
from effnet.metrics.timing import (
    Conditions,
    Timing,
    measure,
    measure_in_turn,
    random_bundle,
    random_images,
    time_rounds,
)
from effnet.runtime.torch import torch_threads
from effnet.weights.layouts import NATIVE

SECONDS = (0.004, 0.001, 0.010, 0.002, 0.003)
MACHINE = Machine("Processor X", 2, None, ("avx2",))


def conditions(threads: int, load: float | None) -> Conditions:
    return Conditions(threads, ("torch 9",), 1, "NCHW", "float32", MACHINE, load)


def test_statistics() -> None:
    taken = Timing(SECONDS)
    assert taken.median_ms == pytest.approx(3)
    assert taken.mean_ms == pytest.approx(4)
    assert taken.stdev_ms == pytest.approx(1e3 * statistics.stdev(SECONDS))
    assert taken.spread_ms == pytest.approx(tuple(1e3 * np.percentile(SECONDS, [10, 90])))
    assert taken.to_dict()["runs"] == 5
    assert (Timing((0.002,)).spread_ms, Timing((0.002,)).stdev_ms) == ((2, 2), 0)


def test_functions_take_turns() -> None:
    rounds = iter([(0, 0), (1, 2), (3, 4)])
    assert [taken.seconds for taken in time_rounds(lambda: next(rounds), runs=2, warmup=1)] == [(1, 3), (2, 4)]
    called, shown = [], []
    progress = SimpleNamespace(update=lambda *update: shown.append(update))
    functions = {name: (lambda name=name: called.append(name)) for name in "ab"}
    taken = measure_in_turn(functions, runs=3, warmup=2, progress=progress)
    assert "".join(called) == "ababababab"
    assert {name: len(times.seconds) for name, times in taken.items()} == {"a": 3, "b": 3}
    assert shown == [("rounds", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize(("round_takes", "runs"), [(60, 7), (1, 20), (1e-6, 30)])
def test_how_many_rounds_fit(round_takes: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds", lambda function: function() and round_takes)
    assert len(time_rounds(lambda: [1.0])[0].seconds) == runs


def test_nothing_is_recorded_for_gradients() -> None:
    measure(lambda: torch.ones(1, requires_grad=True).mul(2).requires_grad and pytest.fail("recorded"), runs=1)


def test_threads_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(("argument", "value"), [("runs", 0), ("warmup", 0), ("runs", 1.5)])
def test_numbers_are_whole_and_positive(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}` \\(={value}\\) must be a positive whole number"):
        measure(lambda: None, **{argument: value})
    with pytest.raises(ArgumentError, match="`threads`"), torch_threads(0):
        pass
    with pytest.raises(ArgumentError, match="the cores of this machine"), torch_threads(100_000):
        pass


def test_random_weights_are_a_network_whose_answers_differ() -> None:
    bundle = random_bundle(effnet.spec("b0", resolution=64))
    network = bundle.network
    assert {name: array.shape for name, array in bundle.weights.items()} == NATIVE.shapes(network.spec)
    with torch.no_grad():
        logits = network(torch.randn(3, 3, 64, 64))
    assert logits.isfinite().all()
    assert 1e-6 < logits.std() < 1e6
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * logits.abs().max()
    again = random_bundle(effnet.spec("b0", resolution=64)).weights
    assert all(np.array_equal(array, again[name]) for name, array in bundle.weights.items())


def test_images_are_laid_out_as_asked() -> None:
    assert random_images(2, 8).is_contiguous(memory_format=torch.channels_last)
    assert random_images(2, 8, 5, layout="NCHW").is_contiguous()
    assert random_images(2, 8, 5, layout="NCHW").shape == (2, 5, 8, 8)


def test_conditions_say_everything() -> None:
    assert str(conditions(2, None)) == "Processor X, 2 cores, AVX2, no bf16\n2 threads, batch 1, float32, NCHW, torch 9"
    here = Conditions.now(4, "channels_last", "torchvision")
    assert here.versions[0] == f"torch {torch.__version__}"
    assert here.versions[1].startswith("torchvision ")
    assert here.threads == torch.get_num_threads()
    assert here.to_dict()["machine"]["processor"]


@pytest.mark.parametrize(
    ("threads", "load", "crowded"), [(2, 0.2, False), (2, 1.0, True), (1, 1.0, False), (9, None, False)]
)
def test_a_crowd_is_noticed(threads: int, load: float | None, crowded: bool) -> None:
    assert conditions(threads, load).crowded == crowded


def test_a_turn_ends_even_where_the_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(timing, "seconds", lambda function: function() or 0.0)
    assert timing.time_turn(lambda: calls.append(1)) == 0.0
    assert len(calls) == timing.CALLS + 1
    monkeypatch.setattr(timing, "seconds", lambda function: function() or timing.TURN / 2)
    calls.clear()
    assert timing.time_turn(lambda: calls.append(1)) == timing.TURN / 2
    assert len(calls) == 3

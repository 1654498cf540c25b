"""Settings of a fit: amounts, the budget from Python, and the recorded command."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnet.errors import ArgumentError
from effnet.fitting.settings import FitOptions, FitPlan, options_of
from effnet.scaling.budget import Budget


def test_amounts_become_numbers() -> None:
    options = FitOptions(macs="100M", file_size="5MB", latency="20ms", train_memory="4GB")
    assert options.limits == {"macs": 100_000_000, "file_size": 5_000_000, "latency": 0.02}
    assert options.budget == options.limits | {"train_memory": 4_000_000_000}


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        ({"macs": "-1"}, "macs"),
        ({"latency": "20"}, "latency"),
        ({"minutes": 0}, "minutes"),
        ({"engine": "tensorrt"}, "engine"),
        ({"precision": "int8", "engine": "native"}, "precision"),
        ({"resolution": 16}, "resolution"),
    ],
)
def test_values_outside_their_range_are_named(values: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError) as error:
        FitOptions(**values)  # type: ignore[arg-type]
    assert error.value.argument == argument


def test_a_budget_gives_its_limits() -> None:
    assert options_of(Budget(macs="1G", resolution=96), minutes=3) == FitOptions(macs="1G", resolution=96, minutes=3)
    assert options_of(None, params="2M").limits == {"params": 2_000_000}


@pytest.mark.parametrize(("name", "value"), [("width", 1.1), ("depth", 1.2), ("max_resolution", 128)])
def test_a_budget_settles_no_network(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match="chooses it") as error:
        options_of(Budget(macs="1G", **{name: value}))  # type: ignore[arg-type]
    assert error.value.argument == name


def test_the_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = FitPlan(tmp_path, tmp_path / "my photos", FitOptions(latency="20ms", minutes=5, engine="onnxruntime"))
    plan.write()
    assert FitPlan.read(tmp_path) == plan
    assert plan.command == f"effnet fit '{tmp_path}/my photos' --latency 20ms --minutes 5 --engine onnxruntime"


def test_another_folder_is_no_fit(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no plan\.yaml"):
        FitPlan.read(tmp_path)

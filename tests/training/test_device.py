"""Trainings on a device that is not the CPU: results, what is waited for, and how they end; see support/pretend.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from short_run import QUICK, Recorder
from tiny import same, weights

from effnet.training.device import Feed, number_formats
from effnet.training.run_folder import RunPlan, load_checkpoint
from effnet.training.train import train

STEPS = 21  # of an epoch of the 42 training images in batches of two
EPOCHS = 3
OPTIONS: dict[str, Any] = {**QUICK, "batch": 2, "epochs": EPOCHS, "lr": 0.005, "save_seconds": 1000.0}
# Adam divides by the gradient's size, so that its last digits would become the first of a weight that hardly matters
SGD: dict[str, Any] = {"precision": "fp32", "lr": 0.3}
LOOP = ("loop.py", "optimizer.py", "learner.py", "device.py")  # of training: what runs in every step

Ran = tuple[Any, dict[str, int]]


def words(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def go(shapes: Path, spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """Train on the pretend device in a fresh process: what the command said, and what it waited for."""

    def run(out: Path, *more: str, environment: Any = (), **options: Any) -> Ran:
        log = tmp_path_factory.mktemp("log") / "log.json"
        given = {"model": spec_file, "recipe": "scratch", "device": "pretend", "out": out, **OPTIONS, **options}
        return pretend.run(log, "train", shapes, *words(**given), *more, **dict(environment))

    return run


@pytest.fixture(scope="module")
def trained(go: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    out = tmp_path_factory.mktemp("pretend") / "run"
    done, waits = go(out, set="optimizer=sgd", **SGD)
    assert done.returncode == 0, done.stderr
    return out, waits


def test_the_device_is_one_and_counts(tmp_path: Path) -> None:
    code = """
import json, sys, warnings, pretend, torch
pretend.register()
device = torch.device("pretend")
x = torch.ones(3, device=device, requires_grad=True)
said = [str(x.device), str((x * 2).sum().device)]
for mixed in (lambda: x + torch.ones(3), lambda: torch.stack([x.detach(), torch.ones(3)]), lambda: x[torch.arange(2)]):
    try:
        mixed()
        said.append("mixed")
    except RuntimeError as error:
        said.append("refused" if "same device" in str(error) else str(error))
(x * 2 + 1).sum().backward()  # numbers without a dimension may mix
before = sum(pretend.waits.values())
x.detach().to(device, non_blocking=True), torch.ones(3).to(device, non_blocking=True)
said.append(sum(pretend.waits.values()) - before)
x.sum().item(), bool(x.sum() > 0), x.detach().cpu(), x.detach().nonzero(), torch.ones(3).to(device), x[x > 0]
with open(sys.argv[1], "w") as file:
    json.dump([said, x.grad.cpu().tolist(), {name.split()[0]: 0 for name in pretend.waits}, dict(pretend.waits)], file)
"""
    log = tmp_path / "log.json"
    done, found = pretend.run(log, code=code.replace("sys.argv[1]", repr(str(log))))
    assert done.returncode == 0, done.stderr
    said, gradient, kinds, waits = found
    assert said == ["pretend:0", "pretend:0", "refused", "refused", "refused", 0]
    assert gradient == [2, 2, 2]
    assert kinds.keys() == {"number", "download", "shape", "upload"}
    assert {name.split()[0]: count for name, count in waits.items()} == {
        "number": 2,
        "download": 2,
        "shape": 2,
        "upload": 1,
    }


def test_it_is_waited_for_once_in_twenty_steps(trained: tuple[Path, dict[str, int]]) -> None:
    waits = {name: count for name, count in trained[1].items() if name.split()[1].startswith("training/")}
    in_steps = {name: count for name, count in waits.items() if name.split(":")[0].rpartition("/")[2] in LOOP}
    looks = sum(count for name, count in in_steps.items() if name.endswith("Updater.look"))
    # the first step, every twentieth, and what is left at the end of an epoch
    assert 0 < looks <= EPOCHS * STEPS // 20 + EPOCHS + 1
    others = {name.split()[-1] for name in in_steps if not name.endswith("Updater.look")}
    assert others == {"Loop.__init__", "Loop.save"}  # the network goes there, and into a checkpoint


def test_it_computes_what_the_cpu_does(
    trained: tuple[Path, dict[str, int]], shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's modules: the CPU's own kernels differ more. Torch's own sum some gradients in another order there."""
    for name in ("models.depthwise", "models.native"):
        monkeypatch.setattr(f"effnet.{name}.is_eager", lambda x: False)
    train(shapes, spec_file, "scratch", out=tmp_path / "run", optimizer="sgd", **OPTIONS | SGD)
    there, here = weights(trained[0]), weights(tmp_path / "run")
    for name in ("network", "average"):
        torch.testing.assert_close(there[name], here[name], rtol=1e-4, atol=1e-5)
    for one, other in zip(there["rows"], here["rows"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    start = load_checkpoint(tmp_path / "run")[0]["rows"][0]["train_loss"]
    assert abs(there["rows"][-1]["train_loss"] - start) > 0.01  # it learned, and by far more than that
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (trained[0], tmp_path / "run"))
    assert one["top1"] == other["top1"]
    assert one["cost"]["device_bytes"] is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_few_bits_come_close(
    go: Callable[..., Ran], trained: tuple[Path, dict[str, int]], tmp_path: Path, precision: str
) -> None:
    done, _ = go(tmp_path / "run", set="optimizer=sgd", **SGD | {"precision": precision})
    assert done.returncode == 0, done.stderr
    there, here = (weights(folder)["rows"] for folder in (trained[0], tmp_path / "run"))
    assert [row["train_loss"] for row in there] != [row["train_loss"] for row in here]
    for one, other in zip(there, here, strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=0.02)
    assert RunPlan.read(tmp_path / "run")[0].execution.precision == precision


STOPPED = """
import sys, pretend
pretend.register()
from short_run import CrashError, Recorder
from effnet.training.train import train
try:
    train(DATA, MODEL, "scratch", device="pretend", out=OUT, progress=Recorder(stop=30), **OPTIONS)
except CrashError:
    sys.exit(5)
"""


def test_a_resumed_run_equals_an_undisturbed_one(
    go: Callable[..., Ran], shapes: Path, spec_file: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = OPTIONS | {"precision": "fp16", "save_seconds": 0.0}  # a checkpoint, and so a look, at every step
    code = f"DATA, MODEL, OUT, OPTIONS = {str(shapes)!r}, {str(spec_file)!r}, {str(parts)!r}, {options!r}{STOPPED}"
    stopped, _ = pretend.run(tmp_path / "none", code=code)
    assert stopped.returncode == 5, stopped.stderr
    assert load_checkpoint(parts)[0]["step"] == 29
    resumed, _ = pretend.run(tmp_path / "log", "train", "--resume", parts)
    assert resumed.returncode == 0, resumed.stderr
    done, _ = go(whole, precision="fp16")  # which looks at every twentieth step
    assert done.returncode == 0, done.stderr
    assert same(weights(whole), weights(parts))
    scalers = [load_checkpoint(folder)[0]["scaler"] for folder in (whole, parts)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] == STEPS * EPOCHS


@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
def test_a_loss_that_is_not_finite_stops_it_at_the_step_and_keeps_the_checkpoint(
    go: Callable[..., Ran], shapes: Path, spec_file: Path, tmp_path: Path, save_seconds: float
) -> None:
    options: dict[str, Any] = {"precision": "fp32", "lr": 1e12, "set": "clip=0"}
    done, _ = go(tmp_path / "run", save_seconds=save_seconds, **options)
    assert done.returncode == 2
    state = load_checkpoint(tmp_path / "run")[0]
    assert all(each.isfinite().all() for each in state["network"].values())
    on_cpu, _ = go(tmp_path / "cpu", **options | {"device": "cpu"}, environment={"EFFNET_NATIVE": "0"})
    assert on_cpu.returncode == 2
    last = on_cpu.stderr.strip().splitlines()[-1]
    assert "finite at step" in last or "the loss is" in last
    step = int(last.partition("at step ")[2].partition(":")[0].partition(",")[0])
    assert f"at step {step}" in done.stderr
    assert state["step"] == (step if save_seconds == 0 else 0)


def test_memory_that_runs_out_is_told_and_the_checkpoint_stays(go: Callable[..., Ran], tmp_path: Path) -> None:
    done, _ = go(tmp_path / "run", precision="fp32", environment={"PRETEND_FULL": "100"})
    assert done.returncode == 2
    assert "memory ran out at step" in done.stderr
    assert "--train-memory" in done.stderr
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 0


def test_a_compiled_network_has_the_names_of_any_other_and_a_failure_is_told(
    shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effnet.models.depthwise.is_eager", lambda x: False)  # as while compiling
    options = {**OPTIONS, "precision": "fp32", "epochs": 1, "batch": 8}

    def go(name: str, backend: Any, **more: Any) -> tuple[dict[str, Any], Recorder]:
        compiled.clear()
        monkeypatch.setattr(torch, "compile", lambda function, *_, **__: compiled.append(function) or backend(function))
        recorder = Recorder()
        train(shapes, spec_file, "scratch", out=tmp_path / name, progress=recorder, **options, **more)
        return weights(tmp_path / name), recorder

    def fail(*_: Any) -> Any:
        raise OSError("no compiler is installed\nand more")

    compiled: list[Any] = []
    working, silent = go("working", torch._dynamo.optimize("eager"), compile=True)
    assert len(compiled) == 1
    failing, told = go("failing", torch._dynamo.optimize(fail), compile=True)
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    plain, _ = go("plain", None)
    assert not compiled
    assert same(working, plain)
    assert same(failing, plain)
    assert not silent.has("torch.compile")
    (message,) = (each for each in told.messages if "torch.compile" in each)
    assert message.startswith("torch.compile failed, so the run goes on without it: ")
    assert "no compiler is installed" in message
    assert "\n" not in message


def test_float32_is_tf32_only_while_a_run_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    gpu = torch.device("cuda", 1)
    for precision, found in (("tf32", ("high", True)), ("fp32", ("highest", False)), ("bf16", ("high", True))):
        with number_formats(gpu, precision):  # type: ignore[arg-type]  # of a tuple
            now = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
            assert now == (*found, False, True)
        assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == before


class Line:
    """A stream or an event that writes down what it is told, in the order in which it is told."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Line) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Line) -> None:
        self.said.append(f"{self.name} waits for {event.name}")

    def record(self, stream: Line) -> None:
        self.said.append(f"{self.name} recorded in {stream.name}")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_buffer_is_filled_when_what_read_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what CUDA would be told, without CUDA."""
    said: list[str] = []
    compute, copies, events = Line("compute", said), Line("copies", said), iter("ab")
    cuda = {
        "Stream": lambda device: copies,
        "current_stream": lambda device: compute,
        "Event": lambda: Line(next(events), said),
        "stream": lambda stream: stream,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    feed = Feed(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]  # of which only the type is read
    feed.device = torch.device("cpu")
    places = []
    for number in range(4):
        pixels, labels = feed(torch.full((2, 3), number), torch.full((2,), number))
        assert pixels.eq(number).all()
        assert labels.eq(number).all()
        places.append(pixels.data_ptr())
        said.append("|")
    assert places[0] == places[2] != places[1] == places[3]
    first, second, third, fourth, _ = " ".join(said).split("|")
    assert "recorded" not in first
    for turn, (mine, last) in zip((second, third, fourth), ("ba", "ab", "ba"), strict=True):
        order = [f"{last} recorded in compute", f"copies waits for {mine}", "compute waits for copies"]
        assert [turn.find(each) for each in order] == sorted(turn.find(each) for each in order)
        assert -1 not in [turn.find(each) for each in order]


def test_there_is_no_such_device(go: Callable[..., Ran], tmp_path: Path) -> None:
    done, _ = go(tmp_path / "run", device="cuda") if not torch.cuda.is_available() else go(tmp_path, device="cuda:99")
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line)
    assert "is not one that torch can use here: cpu" in line
    assert sys.executable not in line
    assert not (tmp_path / "run").exists()

"""Training on another device: results, synchronizations, and how runs end; see support/pretend.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretend
import pytest
import torch
from short_run import QUICK, Recorder
from tiny import same, weights

from effnet.errors import ArgumentError, TrainingError
from effnet.training.device import Feed, number_formats
from effnet.training.run_folder import RunPlan, load_checkpoint
from effnet.training.train import train

STEPS = 21  # of an epoch of the 42 training images in batches of two
EPOCHS = 3
OPTIONS: dict[str, Any] = {**QUICK, "batch": 2, "epochs": EPOCHS, "lr": 0.005, "save_seconds": 1000.0}
# Adam divides by the gradient's size, so that its last digits would become the first of a weight that hardly matters
SGD: dict[str, Any] = {"precision": "fp32", "lr": 0.3}
LOOP = ("loop.py", "optimizer.py", "learner.py", "device.py")  # of training: what runs in every step
NOT_FINITE: dict[str, Any] = {"precision": "fp32", "lr": 1e12, "clip": 0.0}

# All runs in one fresh process: to start it takes longer than they do
PROGRAM = """
import json, pretend
pretend.register()
from pathlib import Path
from short_run import CrashError, Recorder
from effnet.errors import TrainingError
from effnet.training import result
from effnet.training.run_folder import load_checkpoint
from effnet.training.train import resume, train

result._draw = result.write_report = lambda *_: None
said = {}

def go(name, **more):
    pretend.waits.clear()
    try:
        train(DATA, MODEL, "scratch", device="pretend", out=f"{OUT}/{name}", **OPTIONS | more)
        said[name] = dict(pretend.waits)
    except (CrashError, TrainingError) as error:
        said[name] = str(error)

go("fp32", optimizer="sgd", **SGD)
go("bf16", optimizer="sgd", **SGD | {"precision": "bf16"})
go("stopped", precision="fp16", save_seconds=0.0, progress=Recorder(stop=30))  # a checkpoint, and so a look, every step
said["left"] = load_checkpoint(Path(OUT) / "stopped")[0]["step"]
resume(f"{OUT}/stopped")
go("fp16", precision="fp16")  # which looks at every twentieth step
for seconds in (0.0, 1000.0):
    go(f"not finite {seconds:.0f}", save_seconds=seconds, **NOT_FINITE)
pretend.full.append(100)
go("full", precision="fp32")
Path(OUT, "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(shapes: Path, spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the runs on the pretend device, by name, and what was said and waited for."""
    folder = tmp_path_factory.mktemp("pretend")
    values = {"DATA": str(shapes), "MODEL": str(spec_file), "OUT": str(folder)}
    values |= {"OPTIONS": OPTIONS, "SGD": SGD, "NOT_FINITE": NOT_FINITE}
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    done, _ = pretend.run(folder / "said.json", code=given + PROGRAM)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "said.json").read_text()))


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


def test_it_is_waited_for_once_in_twenty_steps(said: dict[str, Any]) -> None:
    in_steps = {
        name: count
        for name, count in said["fp32"].items()
        if name.split()[1].startswith("training/") and name.split(":")[0].rpartition("/")[2] in LOOP
    }
    looks = sum(count for name, count in in_steps.items() if name.endswith("Updater.look"))
    # the first step, every twentieth, and what is left at the end of an epoch
    assert 0 < looks <= EPOCHS * STEPS // 20 + EPOCHS + 1
    others = {name.split()[-1] for name in in_steps if not name.endswith("Updater.look")}
    assert others == {"Loop.__init__", "Loop.save"}  # the network goes there, and into a checkpoint


def test_it_computes_what_the_cpu_does(
    folder: Path, shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's modules: the CPU's own kernels differ more. Torch's own sum some gradients in another order there."""
    for name in ("models.depthwise", "models.native"):
        monkeypatch.setattr(f"effnet.{name}.is_eager", lambda x: False)
    train(shapes, spec_file, "scratch", out=tmp_path / "run", optimizer="sgd", **OPTIONS | SGD)
    there, here = weights(folder / "fp32"), weights(tmp_path / "run")
    for name in ("network", "average"):
        torch.testing.assert_close(there[name], here[name], rtol=1e-4, atol=1e-5)
    for one, other in zip(there["rows"], here["rows"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert abs(there["rows"][-1]["train_loss"] - there["rows"][0]["train_loss"]) > 0.01  # by far more it learned
    one, other = (json.loads((run / "metrics.json").read_text()) for run in (folder / "fp32", tmp_path / "run"))
    assert one["top1"] == other["top1"]
    assert one["cost"]["device_bytes"] is None  # torch counts them on CUDA only


def test_bf16_comes_close(folder: Path) -> None:
    there, here = (weights(folder / name)["rows"] for name in ("fp32", "bf16"))
    assert [row["train_loss"] for row in there] != [row["train_loss"] for row in here]
    for one, other in zip(there, here, strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=0.02)
    assert RunPlan.read(folder / "bf16")[0].execution.precision == "bf16"


def test_a_resumed_run_equals_an_undisturbed_one(folder: Path, said: dict[str, Any]) -> None:
    assert said["left"] == 29
    assert same(weights(folder / "fp16"), weights(folder / "stopped"))
    scalers = [load_checkpoint(folder / name)[0]["scaler"] for name in ("fp16", "stopped")]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] == STEPS * EPOCHS


def test_a_loss_that_is_not_finite_stops_it_at_the_step_and_keeps_the_checkpoint(
    folder: Path, said: dict[str, Any], shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    with pytest.raises(TrainingError) as stopped:
        train(shapes, spec_file, "scratch", out=tmp_path / "run", **OPTIONS | NOT_FINITE)
    step = int(str(stopped.value).partition("at step ")[2].partition(":")[0].partition(",")[0])
    assert 0 < step < 20
    for seconds, left in ((0, step), (1000, 0)):
        assert f"at step {step}" in said[f"not finite {seconds}"]
        state = load_checkpoint(folder / f"not finite {seconds}")[0]
        assert state["step"] == left
        assert all(each.isfinite().all() for each in state["network"].values())


def test_memory_that_runs_out_is_told_and_the_checkpoint_stays(folder: Path, said: dict[str, Any]) -> None:
    assert "memory ran out at step" in said["full"]
    assert "--train-memory" in said["full"]
    assert load_checkpoint(folder / "full")[0]["step"] == 0


def test_a_compiled_network_has_the_names_of_any_other_and_a_failure_is_told(
    shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFNET_NATIVE", "0")  # so that torch's modules compute all of them
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
    plain, _ = go("plain", None)
    assert not compiled
    assert same(working, plain)
    assert same(failing, plain)
    assert not silent.has("torch.compile")
    (message,) = (each for each in told.messages if "torch.compile" in each)
    assert message.startswith("torch.compile failed, so the run goes on uncompiled: ")
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


def test_there_is_no_such_device(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArgumentError, match=r"`device` \(='cuda:1'\) is not one .* here: cpu, cuda:0\.$") as refused:
        train(shapes, device="cuda:1", out=tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()

"""effnet compared with timm on a GPU: training, inference, memory against the forecast, and synchronizations.

    python benchmarks/gpu.py [--rows b0@224x128 b4@380x32] [--rounds 5] [--minutes 9] [--device cuda] [--json]
    python benchmarks/gpu.py --tiny        a smoke test on a CPU, in seconds; its figures mean nothing

The networks of a row have the same random weights, in channels_last and bf16 (autocast; fp16 before Ampere), and take
turns in this process, round by round: inference, and a training step (forward, backward, fused AdamW). Their logits are
compared first. x is relative to timm without torch.compile. Compiled networks come last, while time is left, since
compiling takes most of it.

Then a step as in `effnet train` (loss, clipping, average, images from pinned memory): images/s, torch's peak memory
next to the forecast, and how often the CPU waited for the GPU in 40 steps (torch's sync debug mode). The choices of the
rules for a run are printed above.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from rows import Row
from torch import Tensor, nn

import effnet
from effnet import console
from effnet.arch.memory import gpu_memory, training_memory
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.machine import choose_precision, this_machine
from effnet.training.device import AUTOCAST, Feed, device_peak, forget_device_peak, number_formats
from effnet.training.execution import Images, choose_execution
from effnet.training.learner import Learner, spread
from effnet.training.optimizer import LOOK, Updater
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings

ROWS = "b0@224x128", "b4@380x32"
TINY = ("b0@32x2",)
SECONDS = 0.5  # approximate length of a round of one network
STEPS = 2 * LOOK  # steps in which waits are counted
CLOSE = 0.05  # largest difference of logits in low precision, relative to the largest logit


@dataclass
class Bench:
    """Device and time limits of the benchmark, and its results."""

    device: torch.device
    rounds: int
    deadline: float  # of time.monotonic()
    tiny: bool
    low: torch.dtype | None = None
    found: list[dict[str, Any]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], count: int) -> float:
        """Seconds per `work`, from `count` in a row."""
        self.wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        self.wait()
        return (time.perf_counter() - began) / count

    def compare(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """The median seconds of each work, interleaved round by round, after a warm-up round."""
        counts = {}
        for name, work in works.items():
            self.time(work, 1)
            counts[name] = 1 if self.tiny else max(1, round(SECONDS / self.time(work, 3)))
        laps = [{name: self.time(work, counts[name]) for name, work in works.items()} for _ in range(self.rounds)]
        return {name: statistics.median(lap[name] for lap in laps) for name in works}


def networks_of(row: Row, bench: Bench) -> dict[str, nn.Module]:
    """timm's and effnet's network with the same weights, after checking that their logits agree."""
    torch.manual_seed(0)
    theirs = timm.create_model(f"efficientnet_{row.variant}", drop_path_rate=0.2)
    eps = next(module.eps for module in theirs.modules() if isinstance(module, nn.BatchNorm2d))
    policy = NumericPolicy(bn_eps=eps)
    ours = effnet.EfficientNet(effnet.spec(row.variant, resolution=row.px), policy=policy)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    found = {
        name: network.eval().to(bench.device).to(memory_format=torch.channels_last)
        for name, network in {"timm": theirs, "effnet": ours}.items()
    }
    images = images_of(row, bench)[:2]
    with torch.inference_mode():
        expected, got = (network(images) for network in found.values())
    difference = float((got - expected).abs().max() / expected.abs().max())
    if difference > CLOSE:
        raise SystemExit(f"{row}: logits differ by {difference:.2g} of the largest")
    return found


def images_of(row: Row, bench: Bench) -> Tensor:
    """(N, 3, px, px) float32 on the device, in channels_last."""
    images = torch.randn(row.batch, 3, row.px, row.px, generator=torch.Generator().manual_seed(1))
    return images.to(bench.device).contiguous(memory_format=torch.channels_last)


def inference(network: nn.Module, row: Row, bench: Bench) -> Callable[[], object]:
    """Inference on a batch."""
    images = images_of(row, bench)

    @torch.inference_mode()
    def work() -> Tensor:
        with torch.autocast(bench.device.type, bench.low, enabled=bench.low is not None):
            return network.eval()(images)

    return work


def training(network: nn.Module, row: Row, bench: Bench) -> Callable[[], object]:
    """A training step of any network."""
    images, labels = images_of(row, bench), torch.arange(row.batch, device=bench.device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, fused=True)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.low is torch.float16)

    def work() -> None:
        network.train()
        with torch.autocast(bench.device.type, bench.low, enabled=bench.low is not None):
            logits = network(images)
        scaler.scale(nn.functional.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return work


def compare_networks(row: Row, bench: Bench, *, compiled: bool) -> None:
    """The lines of a row: both networks, inference and training."""
    for title, work in (("inference", inference), ("training", training)):
        networks, suffix = networks_of(row, bench), ", compiled" if compiled else ""
        for network in networks.values() if compiled else ():
            network.compile()
        times = bench.compare({name: work(network, row, bench) for name, network in networks.items()})
        base = times["timm"]
        if compiled:
            known = (each for each in bench.found if each["row"] == str(row) and each["work"] == title)
            base = next((each["seconds"] for each in known if each["network"] == "timm"), base)
        for name, taken in times.items():
            line = {"row": str(row), "work": title, "network": name + suffix, "seconds": taken}
            bench.found.append(line | {"images_per_second": row.batch / taken, "x": base / taken})
        torch._dynamo.reset()
        release()


def release() -> None:
    """Free the memory of deleted networks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Collect the places where the CPU waits for a CUDA GPU, from the warnings of torch's sync debug mode."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    places += [f"{each.filename}:{each.lineno}" for each in said if "called a synchronizing" in str(each.message)]


def run_step(row: Row, bench: Bench, name: str) -> dict[str, Any]:
    """A step as in `effnet train`: speed, memory, waits, and the rules for a run on 100,000 photos."""
    spec: NetworkSpec = effnet.spec(row.variant, resolution=row.px)
    recipe, settings = Recipe(batch=row.batch), Settings(device=name)
    chosen = choose_execution(spec, recipe, settings, Images(100_000, 375), world=1)
    low = AUTOCAST.get(chosen.precision)
    learner = Learner(effnet.create(spec).to(memory_format=torch.channels_last), recipe, InputSpec(row.px, row.px))
    learner.to(bench.device).train()
    updater, feed, done = Updater(learner.network, recipe, chosen.precision), Feed(bench.device), 0
    pixels = torch.randint(0, 256, (chosen.part, row.px, row.px, 3), dtype=torch.uint8)
    labels = torch.arange(chosen.part)
    if bench.device.type == "cuda":
        pixels, labels = pixels.pin_memory(), labels.pin_memory()

    def step() -> None:
        nonlocal done
        for _ in range(chosen.parts):
            with torch.autocast(bench.device.type, low, enabled=low is not None):
                loss, logits = learner(*feed(pixels, labels), False)
            updater.scaler.scale(loss / chosen.parts).backward()
        updater.update(done, 0.5, loss.detach(), spread(logits))
        done += 1

    forget_device_peak(bench.device)
    with number_formats(bench.device, chosen.precision):
        bench.time(step, 1 if bench.tiny else LOOK + 1)  # the first step is checked by itself, then LOOK together
        with counted_waits(bench.device) as waits:
            taken = bench.time(step, 1 if bench.tiny else STEPS)
    options = {"optimizer": recipe.optimizer, "ema": True, "precision": chosen.precision, "kernels": False}
    memory = gpu_memory(spec, chosen.part, training_memory(spec, chosen.part, **options))
    return {
        "row": str(row),
        "rules": chosen,
        "images_per_second": row.batch / taken,
        "forecast": memory,
        "peak": device_peak(bench.device),
        "waits": len(waits),
        "places": sorted(set(waits)),
    }


def show(bench: Bench, runs: list[dict[str, Any]], skipped: list[str], title: str) -> None:
    """Print the tables."""
    lines = [
        (each["row"], each["work"], each["network"], f"{each['images_per_second']:,.0f}", f"{each['x']:.2f}")
        for each in bench.found
    ]
    console.table(("<row", "<work", "<network", "images/s", "x of timm"), lines, title=title)
    for name in skipped:
        console.remark(f"not measured, for want of time: {name}")
    table = []
    for run in runs:
        rules = run["rules"]
        console.remark(
            f"the rules for {run['row']}: {rules.precision}, {rules.parts} x {rules.part} images, {rules.workers} "
            f"workers, float32 products {rules.float32!r}"
        )
        peak = run["peak"]
        memory = (console.size(peak), f"{run['forecast'] / peak:.3f}") if peak else ("no GPU", "-")
        waits = f"{run['waits']} in {STEPS}" if peak else "no GPU"
        table.append((run["row"], f"{run['images_per_second']:,.0f}", console.size(run["forecast"]), *memory, waits))
        for place in run["places"]:
            console.remark(f"waited at {place}")
    columns = "<a step of effnet train", "images/s", "forecast", "torch's peak", "forecast / peak", "waits in steps"
    console.table(columns, table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="b0@224x128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    device, tiny = torch.device(options.device), options.tiny
    rows = [Row.parse(text) for text in options.rows or (TINY if tiny else ROWS)]
    bench = Bench(device, 1 if tiny else options.rounds, began + 60 * options.minutes, tiny)
    precision, reason = choose_precision(options.device) if device.type == "cuda" else ("fp32", "this is not a GPU")
    bench.low = AUTOCAST.get(precision)
    for row in rows:
        compare_networks(row, bench, compiled=False)
    runs = [run_step(row, bench, options.device) for row in rows]
    release()
    skipped, longest = [], 0.0
    for row in [] if tiny or options.no_compile else rows:
        if bench.deadline - time.monotonic() < max(120.0, 2 * longest):  # a larger network takes longer to compile
            skipped.append(f"{row}, compiled")
            continue
        started = time.monotonic()
        compare_networks(row, bench, compiled=True)
        longest = max(longest, time.monotonic() - started)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(this_machine())
    title = f"{where}; {precision} ({reason}); torch {torch.__version__}, timm {timm.__version__}; medians of "
    title += f"{bench.rounds} rounds; {(time.monotonic() - began) / 60:.1f} minutes"
    if options.json:
        plain = [run | {"rules": vars(run["rules"])} for run in runs]
        sys.stdout.write(console.json_line({"title": title, "found": bench.found, "runs": plain, "skipped": skipped}))
    else:
        show(bench, runs, skipped, title)


if __name__ == "__main__":
    main()

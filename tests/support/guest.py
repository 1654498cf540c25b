"""A program with its own settings that calls every operation of effnet once, and writes as JSON what each changed.

It imports torch with its compiler, matplotlib, Pillow and numpy beforehand, so their imports are not counted.
"""

from __future__ import annotations

import dataclasses
import decimal
import faulthandler
import gc
import hashlib
import json
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch._dynamo  # every optimizer of torch imports it at its first step
import torch._inductor.codecache
from PIL import Image, ImageFile
from tiny import CLASSES, draw_images, tiny_spec, write_spec

PHOTO = Path(__file__).parents[2] / "src" / "effnet" / "data" / "photos" / "chelsea.png"
BASELINE = Path(__file__).parents[2] / "examples" / "baselines" / "separable.yaml"
SIGNALS = [each for each in signal.Signals if each not in (signal.SIGKILL, signal.SIGSTOP)]
LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]


def choose_settings() -> None:
    """Change settings as a program may: each differs from the default of Python or its library."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    os.umask(0o27)
    decimal.getcontext().prec = 11
    np.seterr(over="ignore")
    np.set_printoptions(precision=3)
    warnings.filterwarnings("default", message="the program's own")
    logging.root.setLevel(logging.ERROR)
    logging.getLogger("effnet").setLevel(logging.CRITICAL)
    gc.set_threshold(701, 11, 11)
    told = sys.excepthook
    sys.excepthook = lambda *error: told(*error)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = 10**9, True
    plt.rcParams["font.size"] = 9
    random.seed(1)
    np.random.seed(2)  # the global generator
    torch.manual_seed(3)


def settings() -> dict[str, Any]:
    """The process's settings by name, for JSON; lists and dictionaries stay divided into their items."""
    umask = os.umask(0)
    os.umask(umask)
    context, root, backends = decimal.getcontext(), logging.root, torch.backends
    found = {
        "signals": {each.name: signal.getsignal(each) for each in SIGNALS},
        "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "umask": umask,
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
        "niceness": os.nice(0),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "locale": locale.setlocale(locale.LC_ALL),
        "decimal": (context.prec, context.rounding, context.traps),
        "random": _digest(random.getstate()),
        "warnings": list(warnings.filters),
        "form of warnings": (warnings.showwarning, warnings.formatwarning),
        "logging": (root.level, root.handlers, root.manager.disable, logging.lastResort),
        "classes of logging": (logging.getLoggerClass(), logging.getLogRecordFactory()),
        "effnet's logger": vars(logging.getLogger("effnet")) | {"_cache": None},
        "sys.path": sys.path,
        "sys.meta_path": sys.meta_path,
        "sys.path_hooks": sys.path_hooks,
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook),
        "tracing": (sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile()),
        "files of Python": (sys.stdin, sys.stdout, sys.stderr),
        "interpreter": (sys.argv, sys.getrecursionlimit(), sys.getswitchinterval(), threading.stack_size()),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.get_debug()),
        "faulthandler": faulthandler.is_enabled(),
        "multiprocessing": multiprocessing.get_start_method(allow_none=True),
        "processes": multiprocessing.active_children(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "open files": _open_files(),
        "temporary files": sorted(each.name for each in Path(tempfile.gettempdir()).iterdir()),
        "modules that may not be imported": sorted(name for name, module in sys.modules.items() if module is None),
        "numpy": (np.geterr(), np.geterrcall(), np.get_printoptions()),
        "numpy's random numbers": _digest(np.random.get_state()),
        "tiny numbers": float(np.float32(1e-40) * np.float32(1)),  # a library may make the processor round them to 0
        "torch": (torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()),
        "torch's device": torch.get_default_device(),
        "torch's random numbers": _digest(torch.get_rng_state().tolist()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "cudnn": {
            name: getattr(backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        },
        "tf32": backends.cuda.matmul.allow_tf32,
        "torch's processes": torch.multiprocessing.get_sharing_strategy(),
        "torch's functions": {name: value for name, value in vars(torch).items() if callable(value)},
        "matplotlib": dict(plt.rcParams),
        "figures": plt.get_fignums(),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
    }
    return {name: _text(value) for name, value in found.items()}


def _digest(state: object) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()[:12]


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): repr(item) for name, item in value.items()}
    return [repr(item) for item in value] if isinstance(value, list) else repr(value)


def _open_files() -> list[str]:
    names = []
    for file in [*Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # that of the listing itself
            names.append(str(file.readlink()))
    return sorted(names)


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The differences, in words."""
    told = []
    for name, old in before.items():
        new = after[name]
        if isinstance(old, dict):
            names = sorted(old.keys() | new.keys())
            told += [f"{name}: {n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]
        elif isinstance(old, list):
            told += [f"{name}: gone {item}" for item in old if item not in new]
            told += [f"{name}: new {item}" for item in new if item not in old]
        elif old != new:
            told.append(f"{name}: {old} -> {new}")
    return told


def operations(root: Path) -> dict[str, Callable[[], object]]:
    """Each operation in its smallest form; later ones use the output of the first ones."""
    import effnet

    model, data, int8 = root / "model", root / "data", root / "int8"

    def predict(engine: Any) -> None:
        with effnet.load("lite0", engine=engine, threads=1) as classifier:
            classifier.predict(PHOTO)

    def save() -> None:
        from effnet.models.efficientnet import EfficientNet

        with torch.random.fork_rng(()):  # new networks draw their weights, as all modules of torch do
            network = EfficientNet(dataclasses.replace(tiny_spec(), num_classes=3))
        effnet.save(network, model, classes=CLASSES, input=effnet.InputSpec(32, 32))

    def scale() -> None:
        effnet.cost(effnet.scale(effnet.spec("b0"), 1))
        effnet.fit_spec(effnet.Budget(macs="1G"))

    def export(name: str, format: Any) -> None:
        from effnet.exporting.export import export
        from effnet.weights.bundle import open_bundle

        with effnet.load(export(open_bundle(model), root / name, format=format).path) as classifier:
            classifier.predict(PHOTO)

    def quantise() -> None:
        from effnet.data.dataset import read_data, split_data
        from effnet.data.held_out import TrainVal
        from effnet.exporting.int8 import export_int8
        from effnet.weights.bundle import open_bundle

        split = split_data(read_data(data), val=0.5, test=0, seed=0)
        export_int8(open_bundle(model), int8, TrainVal(split.subset("train"), split.subset("val")), max_drop=99)

    def explain() -> None:
        from effnet.explaining.faithfulness import measure
        from effnet.plots.overlay import draw_overlay

        with effnet.load(model) as classifier:
            found = classifier.explain(PHOTO)
            measure(classifier.logits, found)
        draw_overlay([found], [found.label], root / "overlay.jpg")

    def evaluate() -> None:
        from effnet.data.dataset import read_data
        from effnet.metrics.evaluate import evaluate, predict_logits
        from effnet.plots.evaluation import draw_confusion

        images = read_data(data)
        with effnet.load(model) as classifier:
            found = predict_logits(classifier.logits, classifier.input, images)
        draw_confusion(evaluate(found.logits, found.labels, images.classes).pairs, CLASSES, root / "confusion.png")

    def check() -> None:
        from effnet.checking.findings import check
        from effnet.checking.labels import find_label_errors
        from effnet.data.dataset import read_data

        check(read_data(data))
        find_label_errors(read_data(data), model)

    def pack() -> None:
        from effnet.data.dataset import read_data
        from effnet.packing.pack import pack

        pack(read_data(data), root / "packed", 10**6)

    def profile() -> None:
        from effnet.profiling.profile import TimingOptions, profile

        for engine in ("torch", "openvino", "onnxruntime"):
            profile(tiny_spec(), TimingOptions(threads=1, runs=2), engine=engine)  # type: ignore[arg-type]

    def bench() -> None:
        from effnet.benchmarking import bench as module
        from effnet.metrics import timing

        timing.TURN, module.COLD_STARTS = 0, 0
        module.bench(str(model), module.BenchPlan(batches=(1,), rounds=1))

    def convert() -> None:
        from effnet.weights.load import build, read
        from effnet.weights.verify import logit_difference

        checkpoint = read("lite0")
        logit_difference(checkpoint, build(checkpoint))

    def train() -> None:
        from effnet.training.train import resume

        spec = str(write_spec(root / "tiny.yaml"))
        run = effnet.train(
            data, spec, "scratch", out=root / "run", batch=8, epochs=1, workers=0, threads=1, resolution=32
        )
        resume(run.folder)

    def search() -> None:
        from executor import InThisProcess

        import effnet.searching.search as module
        from effnet.arch.specfile import read_spec
        from effnet.searching.halving import Trial
        from effnet.searching.plan import SearchOptions, WorkOptions

        def score(job: Any) -> Trial:
            multiprocessing.get_start_method()  # as starting a process by spawn does
            return Trial(job, 0.5, 1.0)

        module.LocalExecutor = lambda plan, workers: InThisProcess(score)  # type: ignore[assignment,misc]
        options = SearchOptions(triple=("1,1.4,1", "1.7,1.1,1"), rungs=1, seeds=1, finalists=1, epochs=0.5, val=0.3)
        module.search(data, read_spec(BASELINE), options, WorkOptions(workers=1), out=root / "search")

    def fit() -> None:
        from effnet.fitting import fit as module
        from effnet.fitting.probes import start_of

        def finish(plan: Any, progress: Any, ray: Any) -> None:
            images, candidates = module.consider(plan)
            start_of(plan, images, next(each for each in candidates if each.refused is None))
            (plan.folder / module.RESULT).write_text("{}")

        module._finish = finish
        effnet.fit(data, out=root / "fit", macs="8M", resolution=32, threads=1)

    def serve() -> None:
        from effnet.serving.command import ServeOptions, serve
        from effnet.serving.server import Server

        tick = Server.on_tick

        async def end(server: Server, counter: int) -> bool:
            if server._catalogue.state == "ready":
                server._end = 0.0
            return await tick(server, counter)

        Server.on_tick = end  # type: ignore[method-assign]
        serve(str(model), options=ServeOptions(port=0))

    return {
        "save": save,
        "scale": scale,
        "predict with native": lambda: predict("native"),
        "predict with torch": lambda: predict("torch"),
        "predict with OpenVINO": lambda: predict("openvino"),
        "predict with ONNX Runtime": lambda: predict("onnxruntime"),
        "export for OpenVINO": lambda: export("openvino", "openvino"),
        "export for ONNX Runtime": lambda: export("model.onnx", "onnx"),
        "export for torch": lambda: export("model.pt2", "torch"),
        "explain": explain,
        "evaluate": evaluate,
        "check": check,
        "pack": pack,
        "profile": profile,
        "bench": bench,
        "convert": convert,
        "train": train,
        "search": search,
        "fit": fit,
        "serve": serve,
        "export in int8": quantise,
    }


def main() -> None:
    """Call all of them, one after the other, in the folder of the command line."""
    root = Path(sys.argv[1])
    draw_images(root / "data", 10)
    Image.init()
    choose_settings()
    found = {}
    for name, act in operations(root).items():
        before = settings()
        act()
        gc.collect()
        found[name] = changes(before, settings())
    (root / "changes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""What the plain install promises, without torch: run by `make check` in a virtual environment of its own."""

import importlib
import importlib.resources
import sys

import numpy as np

import effnet

PROMISED = (
    "effnet.arch.baselines",
    "effnet.arch.cost",
    "effnet.arch.memory",
    "effnet.arch.ops",
    "effnet.arch.recompute",
    "effnet.arch.shape",
    "effnet.describing.rivals",
    "effnet.arch.spec",
    "effnet.arch.specfile",
    "effnet.arch.table",
    "effnet.arch.variants",
    "effnet.cli",
    "effnet.benchmarking.command",
    "effnet.scaling.budget_command",
    "effnet.checking.command",
    "effnet.converting.command",
    "effnet.exporting.command",
    "effnet.describing.command",
    "effnet.predicting.command",
    "effnet.profiling.command",
    "effnet.scaling.command",
    "effnet.searching.command",
    "effnet.training.command",
    "effnet.evaluating.command",
    "effnet.console",
    "effnet.checking.check",
    "effnet.data.duplicates",
    "effnet.data.dataset",
    "effnet.data.photo",
    "effnet.data.preprocess",
    "effnet.data.paths",
    "effnet.runtime.artifact",
    "effnet.benchmarking.bench",
    "effnet.runtime.engines",
    "effnet.runtime.graph",
    "effnet.runtime.onnx",
    "effnet.runtime.openvino",
    "effnet.runtime.classifier",
    "effnet.errors",
    "effnet.machine",
    "effnet.scaling.budget",
    "effnet.searching.claim",
    "effnet.scaling.compound",
    "effnet.scaling.fitting",
    "effnet.scaling.laws",
    "effnet.searching.halving",
    "effnet.searching.candidates",
    "effnet.fields",
    "effnet.weights.bundle",
    "effnet.weights.layouts",
    "effnet.weights.registry",
)

for module in PROMISED:
    importlib.import_module(module)
assert sys.modules.get("torch") is None, "torch is installed here, so this run shows nothing"

from effnet.data.preprocess import preprocess  # noqa: E402
from effnet.runtime.classifier import Classifier  # noqa: E402

spec = effnet.spec("b0")
print(spec.name, effnet.cost(spec).params)

photo = importlib.resources.files("effnet") / "data" / "photos" / "coffee.png"
see = effnet.InputSpec()
with importlib.resources.as_file(photo) as path:
    assert preprocess(path, see).shape == (3, 224, 224)
    # an engine without torch: any function from pixels to logits
    classifier = Classifier(
        lambda pixels: np.eye(1000, dtype=np.float32)[pixels[:, 0, 0, 0]], spec=spec, input=see, classes=None
    )
    print(classifier.predict(path).label)

refusal = ""
try:
    effnet.load("lite0")
except effnet.EffnetError as error:
    refusal = str(error)
assert "pip install 'effnet[torch]'" in refusal, refusal

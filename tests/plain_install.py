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
    "effnet.arch.plan",
    "effnet.arch.shape",
    "effnet.arch.rivals",
    "effnet.arch.spec",
    "effnet.arch.specfile",
    "effnet.arch.table",
    "effnet.arch.variants",
    "effnet.cli",
    "effnet.commands.bench",
    "effnet.commands.budget",
    "effnet.commands.check",
    "effnet.commands.convert",
    "effnet.commands.export",
    "effnet.commands.info",
    "effnet.commands.predict",
    "effnet.commands.profile",
    "effnet.commands.scale",
    "effnet.commands.search",
    "effnet.commands.train",
    "effnet.commands.val",
    "effnet.console",
    "effnet.data.check",
    "effnet.data.duplicates",
    "effnet.data.folder",
    "effnet.data.photo",
    "effnet.data.preprocess",
    "effnet.data.sources",
    "effnet.deploy.artifact",
    "effnet.deploy.bench",
    "effnet.deploy.engines",
    "effnet.deploy.graph",
    "effnet.deploy.onnx",
    "effnet.deploy.openvino",
    "effnet.deploy.runtime",
    "effnet.errors",
    "effnet.machine",
    "effnet.scaling.budget",
    "effnet.scaling.claim",
    "effnet.scaling.compound",
    "effnet.scaling.fitting",
    "effnet.scaling.laws",
    "effnet.scaling.search",
    "effnet.scaling.triples",
    "effnet.scaling.units",
    "effnet.weights.bundle",
    "effnet.weights.layouts",
    "effnet.weights.registry",
)

for module in PROMISED:
    importlib.import_module(module)
assert sys.modules.get("torch") is None, "torch is installed here, so this run shows nothing"

from effnet.data.preprocess import preprocess  # noqa: E402
from effnet.deploy.runtime import Classifier  # noqa: E402

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

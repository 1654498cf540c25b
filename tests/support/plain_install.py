"""Checks of the plain install without torch, run by `make check` in its own virtual environment."""

import contextlib
import importlib
import importlib.resources
import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import effnet
from effnet.cli import COMMANDS, main
from effnet.errors import EXTRAS, MissingExtraError

SOURCE = Path(effnet.__file__).parent
WEIGHTS = ("arrays", "bundle", "convert", "files", "hub", "keras", "layouts", "load", "pickles", "registry")
PROMISED = (
    "arch",
    "scaling",
    "describing",
    "checking",
    "cli",
    "console",
    "errors",
    "fields",
    "files",
    "machine",
)
PROMISED += ("data/image", "data/paths", "data/dataset", "runtime/classifier", "runtime/artifact", "runtime/openvino")
PROMISED += ("runtime/onnx", *(f"weights/{name}" for name in WEIGHTS))

# Every module that promises it is imported; the others may miss optional packages and nothing else.
for path in sorted(SOURCE.rglob("*.py")):
    place = path.relative_to(SOURCE).with_suffix("")
    promised = place.as_posix().startswith(PROMISED) or place.name == "command"
    try:
        importlib.import_module(".".join(("effnet", *place.parts)).removesuffix(".__init__"))
    except ImportError as error:
        if promised or (error.name or "").partition(".")[0] not in EXTRAS:
            raise
assert sys.modules.get("torch") is None, "torch is installed here, so this run shows nothing"


def run(*words: str) -> tuple[object, str]:
    """The exit code of a command, and what it wrote to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            main(list(words))
        except SystemExit as left:
            return left.code, errors.getvalue()
    raise AssertionError("main always exits")


def check() -> None:
    """Every command says what it needs, and what needs no torch works."""
    photo = importlib.resources.files("effnet") / "data" / "photos" / "coffee.png"
    with importlib.resources.as_file(photo) as path:
        for words in (
            ("train", str(path.parent)),
            ("convert", str(path)),
            ("profile", "b0"),
            ("search", "run", str(path.parent)),
            *(() if find_spec("fastapi") else (("serve", "lite0"),)),  # in the tests, which have it, it would serve
            ("export", "lite0", "--format", "torch"),
        ):
            code, said = run(*words)
            assert (code, said.count("\n")) == (2, 1), (words, code, said)
            extra = COMMANDS[words[0]][1]
            assert f"pip install 'effnet[{extra}]'" in said, (words, said)
        for words in (
            ("info", "b0"),
            ("scale", "--macs", "300M"),
            ("--help",),
            *((name, "--help") for name in COMMANDS),
        ):
            assert run(*words)[0] == 0, words
        for name, call, extra in (
            ("effnet.create", lambda: effnet.create("b0"), "torch"),
            ("a network as a torch module", lambda: effnet.create("lite0", weights="lite0"), "torch"),
            ("effnet.save", lambda: effnet.save(None, "bundle"), "torch"),
            ("effnet.train", lambda: effnet.train("photos", "lite0"), "train"),
            ("effnet.fit", lambda: effnet.fit("photos"), "train"),
        ):
            said = "no error"
            try:
                call()
            except MissingExtraError as error:
                said = str(error)
            assert said.startswith(f"{name} needs torch, "), (name, said)
            assert f"pip install 'effnet[{extra}]'" in said, (name, said)

        from effnet.data.image import load_pixels
        from effnet.runtime.classifier import Classifier
        from effnet.runtime.load import read_model
        from effnet.weights.bundle import BundleConfig

        input_spec = effnet.InputSpec()
        assert load_pixels(path, input_spec).shape == (224, 224, 3)
        # an engine without torch: any function from pixels to logits
        config = BundleConfig(effnet.spec("b0"), effnet.NumericPolicy(), input_spec)
        classifier = Classifier(lambda pixels: np.eye(1000, dtype=np.float32)[pixels[:, 0, 0, 0]], config)
        print(classifier.predict(path).label)

        # the weights of Lite0 are installed and read without torch; where no engine is, the error names one
        assert "classifier.weight" in read_model("lite0").weights
        code, said = run("predict", str(path))
        assert code == 0 or "running lite0" in said, said
        assert code == 0 or "pip install 'effnet[" in said, said
    print("b0", effnet.cost(effnet.spec("b0")).params)


if __name__ == "__main__":  # search would start processes, each of which runs this file again
    check()

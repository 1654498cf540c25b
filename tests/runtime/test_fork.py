"""A process forked after its models have answered, as by gunicorn --preload: it answers, ends, and never hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effnet.exporting.export import export
from effnet.native import instruction_sets
from effnet.weights.load import open_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

COMPILED = pytest.mark.skipif(not instruction_sets(), reason="the kernels are not compiled")
PARENT = """
import faulthandler, os, sys, threading, warnings
import numpy as np
import effnet
warnings.simplefilter("ignore")  # of forks beside threads, since Python 3.12
model, engine = sys.argv[1:]
images = [np.full((64, 64, 3), value, np.uint8) for value in range(16)]
classifier = effnet.load(model, engine=engine, precision=None)
expected = classifier.predict(images), classifier.predict(images[3])
stream = classifier.stream(iter(images), batch=2)
next(stream)
stopped = False

def go_on():
    while not stopped:
        classifier.predict(images[:6])

busy = threading.Thread(target=go_on)
busy.start()
child = os.fork()
if not child:
    faulthandler.dump_traceback_later(60, exit=True)
    assert classifier.predict(images[3]) == expected[1]
    assert classifier.predict(images) == expected[0]
    assert effnet.load(model, engine=engine, precision=None).predict(images) == expected[0]
    try:
        list(stream)
    except effnet.EffnetError as error:
        assert "forked" in str(error)
    else:
        raise AssertionError
    classifier.close()
    sys.exit(7)  # with all that the interpreter's end does
_, status = os.waitpid(child, 0)
stopped = True
busy.join()
print(os.waitstatus_to_exitcode(status))
"""


AT_ONCE = """
import faulthandler, os, sys, time
import numpy as np
import effnet
images = [np.full((64, 64, 3), value, np.uint8) for value in range(3)]
expected = effnet.load("lite0", engine="native").predict(images)
for wait in range(5):
    classifier = effnet.load("lite0", engine="native")  # which begins to compile
    time.sleep(0.005 * wait)
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(60, exit=True)
        sys.exit(0 if classifier.predict(images) == expected else 1)
    assert classifier.predict(images) == expected
    _, status = os.waitpid(child, 0)
    assert not status
"""


@COMPILED
def test_a_process_forked_while_its_model_is_compiled() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", AT_ONCE], check=True, timeout=150)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(open_model("lite0"), folder / "m.onnx", format="onnx", batch=None)
    return folder


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        pytest.param("lite0", "native", marks=COMPILED),
        ("lite0", "torch"),
        ("lite0", "openvino"),
        ("lite0", "onnxruntime"),
        ("m.onnx", "onnxruntime"),
    ],
)
def test_a_forked_process_answers_and_ends(exported: Path, model: str, engine: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    command = [sys.executable, "-c", PARENT, model, engine]
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, timeout=150)
    assert done.stdout == "7\n", done.stderr

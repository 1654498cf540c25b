"""A process that reads image files as effnet predict, check and train do, one by one, and reports on each.

    python -m attacks.reader < PATHS      (in drills/) a line of JSON for each line of standard input

It is watched from outside: if it crashes or hangs, the cause is the last file that it was given.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from effnet import load
from effnet.data.fingerprint import read_fingerprint
from effnet.data.image import identify, open_photo
from effnet.data.jpeg import read_pixels
from effnet.errors import EffnetError

MOST_COMPARED = 4_000_000  # most pixels of a photo that is also decoded by training's readers


def peak_mb(*, reset: bool = False) -> float:
    """Peak memory of this process since the last reset; 0 if the system does not report it."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1000
    return 0.0


def attempt(read: Callable[[], Any]) -> tuple[Any, str, str]:
    """The result, the reason of a refusal, and an exception that should not have been raised."""
    try:
        return read(), "", ""
    except EffnetError as error:
        return None, str(error), ""
    except BaseException as error:
        return None, "", f"{type(error).__name__}: {error}"


def main() -> None:
    """Read the files that standard input names."""
    classifier = load("lite0")
    print(json.dumps({"base_mb": peak_mb()}), flush=True)
    for line in sys.stdin:
        path = Path(json.loads(line))
        base, began = peak_mb(reset=True), time.process_time()
        _, refused, raised = attempt(lambda path=path: classifier.read(path))
        middle = time.process_time()
        known, _, broken = attempt(lambda path=path: read_fingerprint(path))
        times, peak = (middle - began, time.process_time() - middle), peak_mb()
        size = attempt(lambda path=path: math.prod(identify(io.BytesIO(path.read_bytes())).size))[0] or 0
        differs = ""
        if known is not None and size <= MOST_COMPARED:
            photo, trained = attempt(lambda p=path: np.array(open_photo(p))), attempt(lambda p=path: read_pixels(p))
            if photo[1:] != trained[1:] or (photo[0] is not None and not np.array_equal(photo[0], trained[0])):
                differs = f"{photo[1:]} {trained[1:]}"
        told = {
            "refused": refused,
            "raised": raised or broken,
            "differs": differs,
            "seconds": max(times),
            "mb": peak - base,
            "pixels": size,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

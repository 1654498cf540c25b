"""effnet's own engine under AddressSanitizer: extreme weights, and networks with wrong sizes, counts and lengths.

    python drills/engine.py [--seed 0] [--tries 20000] [--minutes 30] [--short] [--only NUMBER]

A network must be refused in one line, or run within its memory; if a weight is NaN, the output must not be finite. The
library is first compiled with AddressSanitizer and UndefinedBehaviorSanitizer, or reused from `make check`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from attacks.watched import Watched
from verdict import Scale, begin

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
import sanitized  # noqa: E402  # tests/support is on the path from here on
from native_build import load_build  # noqa: E402  # likewise

SCALE = Scale(tries=20_000, minutes=30, short_tries=300, short_minutes=1)
SANITIZERS = "address,undefined"


def main() -> int:
    """Run the drill and return its exit code."""
    drill = begin("engine", SCALE, __doc__)
    if sys.platform != "linux":
        print("engine: sanitizers need Linux; it is left out.")
        return 0
    build = load_build()
    library = ROOT / "build" / "sanitized" / SANITIZERS / build.LIBRARY.name
    short = drill.short and not library.exists()
    try:
        library = library.with_name("portable.so") if short else library
        build.compile_library(library, SANITIZERS, () if short else tuple(build.X86_ISAS))
        environment = sanitized.environment(build) | {"EFFNET_KERNELS": str(library)}
    except build.BuildError as error:
        print(f"engine: {error}")
        return 1
    user = Watched("engine_user", environment=environment)
    try:
        for number in drill.numbers():
            if drill.over:
                break
            told = user.tell([drill.seed, number])
            drill.done += 1
            wrong = told if isinstance(told, str) else told["wrong"]
            if wrong:
                drill.fault(number, wrong[:300])
    finally:
        user.close()
    return drill.finish()


if __name__ == "__main__":
    sys.exit(main())

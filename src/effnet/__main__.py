"""What the command `effnet` starts, and `python -m effnet`."""

import gc
import os


def main() -> None:
    """Run the command that was typed, and leave with its exit code."""
    # Else numpy's threads look for work for 30 ms, on a core that the weights are read on, before they sleep.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles
    # Else torch's threads look for work for 15 ms, on cores that other programs need and that this one then waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # some 50 us
    gc.disable()  # until the command runs: imports leave no garbage, and looking for it takes 10 ms
    from effnet.cli import main as run

    run()


if __name__ == "__main__":
    main()

"""What the command `effnet` starts, and `python -m effnet`."""

import gc
import os

BUSY = 0.35  # of the cores; with a step of training on both of two, another program on one made it 2.8 times as long


def is_busy() -> bool:
    """Whether other programs used much of the processor in the last minute."""
    if not hasattr(os, "getloadavg"):  # Windows
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.getloadavg()[0] > BUSY * cores


def main() -> None:
    """Run the command that was typed, and leave with its exit code."""
    # Else numpy's threads look for work for 30 ms, on a core that the weights are read on, before they sleep.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles
    if is_busy():
        # Else torch's threads look for work for 15 ms, on cores that others use and that this program then waits for.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # some 50 us
    gc.disable()  # until the command runs: imports leave no garbage, and looking for it takes 10 ms
    from effnet.cli import main as run

    run()


if __name__ == "__main__":
    main()

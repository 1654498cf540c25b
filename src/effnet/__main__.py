"""The entry point of `effnet` and `python -m effnet`."""

import gc
import os

# Share of the cores. A training step on both of two cores took 2.8 times as long with another program on one of them.
BUSY = 0.35


def is_busy() -> bool:
    """Whether other programs used much of the processor in the last minute."""
    if not hasattr(os, "getloadavg"):  # Windows
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.getloadavg()[0] > BUSY * cores


def main() -> None:
    """Run the command of the command line, and exit with its code."""
    # Otherwise numpy's threads spin for 30 ms before they sleep, on a core that reads the weights.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles
    if is_busy():
        # Otherwise torch's threads spin for 15 ms on cores that other programs use.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # about 50 us
    gc.disable()  # until the command runs: imports leave no garbage, and collecting takes 10 ms
    from effnet.cli import main as run

    run()


if __name__ == "__main__":
    main()

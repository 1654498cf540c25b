"""What the command `effnet` starts, and `python -m effnet`."""

import gc


def main() -> None:
    """Run the command that was typed, and leave with its exit code."""
    gc.disable()  # until the command runs: imports leave no garbage, and looking for it takes 10 ms
    from effnet.cli import main as run

    run()


if __name__ == "__main__":
    main()

"""`python -m effnet` is the command `effnet`."""

from effnet.cli import main

if __name__ == "__main__":
    main()

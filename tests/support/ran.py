"""A command line, run in this process."""

from __future__ import annotations

import pytest

from effnet.cli import main


class Run:
    """The output and exit code of a command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        self.code = left.value.code
        self.out, self.err = capsys.readouterr()

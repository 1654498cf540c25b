"""A watched process that answers line by line; a crash or hang counts as an answer, and restarts it."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HANG = 120.0  # seconds without an answer: nothing takes that long, even on a busy machine
STARTING = 600.0  # seconds until it is ready


class Watched:
    """Runs a neighbouring module that writes a line of JSON when it is ready, and one for each line that it reads."""

    def __init__(self, module: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.environment = environment
        self.words = [sys.executable, "-m", f"attacks.{module}", *words]
        self.lines: queue.Queue[str] = queue.Queue()
        self.process: subprocess.Popen[str] | None = None

    def tell(self, question: object) -> dict[str, Any] | str:
        """Send a request; return the answer, or how the process ended."""
        if self.process is None:
            self.start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        print(json.dumps(question), file=process.stdin, flush=True)
        try:
            line = self.lines.get(timeout=HANG)
        except queue.Empty:
            self.close()
            return f"hangs for {HANG:.0f} s"
        if line:
            return dict(json.loads(line))
        code = process.wait()
        self.process = None
        self.errors.seek(0)
        said = self.errors.read()[-2000:].decode(errors="replace")
        return f"ends the process ({signal.Signals(-code).name if code < 0 else code}): {' | '.join(said.splitlines())}"

    def start(self) -> None:
        """Start the process, and wait until it is ready."""
        self.lines = queue.Queue()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(
            self.words, text=True, cwd=Path(__file__).parents[1], env=self.environment, **pipes
        )
        threading.Thread(target=_follow, args=(self.process.stdout, self.lines), daemon=True).start()
        if not self.lines.get(timeout=STARTING):
            raise RuntimeError(f"{self.words[2]} did not start")

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _follow(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")

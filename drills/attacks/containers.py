"""Containers: commands whose memory is limited by a control group, so that the system kills those that exceed it."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from attacks.commands import COMMANDS, Found, NotHereError, Room, damaged, go_on, judge, start, undisturbed

LIBRARIES = 650  # MiB for Python, torch and the libraries for plots and engines


def small_container(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """Limit a command's memory by a control group, as in a container."""
    if random.random() < 0.5:
        name = "train-b0"
        if wrong := undisturbed(room, name):
            return name, [wrong]
    most, group = random.randrange(300, 1200), make_group()
    try:
        (group / "memory.limit_in_bytes").write_text(str(most << 20))
        code, said = start(room, name, at, {}, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    finally:
        wrong = close_group(group)
    what = f"{name} in {most} MiB"
    if code == room.codes[name]:
        return what, wrong + judge(room, name, at, code, said, False, optional=False, cause="")
    wrong += damaged(at, COMMANDS[name])
    if most >= LIBRARIES if code == -signal.SIGKILL else code != 2 or "Traceback" in said or "unexpected" in said:
        wrong.append(f"exit code {code}: {' | '.join(said.splitlines()[-3:])}")
    return what, wrong + go_on(room, name, at, swept=code == 2)


def make_group() -> Path:
    """Make a control group (version 1, as root) and return its folder.

    Raises:
        NotHereError: no group can be made.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, path = line.split(":", 2)
        group = Path("/sys/fs/cgroup/memory", path.lstrip("/"), f"effnet-drill-{os.getpid()}")
        if controller == "memory":
            with suppress(OSError):
                group.mkdir()
                return group
    raise NotHereError("no control groups of version 1 can be made")


def close_group(group: Path) -> list[str]:
    """Remove a control group after its processes have ended; kill those that do not end, and return them as faults."""
    end, left = time.monotonic() + 60, list[str]()
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > end:
                for pid in (group / "cgroup.procs").read_text().split():
                    with suppress(OSError):
                        left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200])
                        os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        else:
            return [f"leaves behind: {each}" for each in left]

"""Surroundings: a disk that becomes full, read-only or broken at any write, few descriptors, little memory, no locks...

Most tries run a command in a fork of this process (which has imported everything) whose disk fails from the n-th call
on that needs space: surroundings.c, loaded with LD_PRELOAD, makes open, write, fsync, mkdir, rename and related calls
fail below the try's folder; the first failing write writes half. The command must end with exit code 2 and one line
that names a file and the cause, or go on if only a cache fails. Every file under a final name must be whole, existing
files must be kept or replaced by whole ones, and once there is space, the same command, or --resume, must give the same
bytes as without the attack and leave no temporary files.

The other tries start a new process: without a home, with 64 descriptors, with little memory, on a disk of a few kB,
with standard output on a full disk, with the clock set back, without locks, or twice on one folder.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from attacks.commands import (
    AGAIN,
    CAUSES,
    COMMANDS,
    REPEATED,
    SHIM,
    Found,
    NotHereError,
    Page,
    Room,
    arm,
    begin_command,
    damaged,
    digests,
    go_on,
    judge,
    last_line,
    make_place,
    prepare,
    run,
    start,
    unattacked,
    undisturbed,
)
from attacks.containers import small_container
from killing.processes import HANG, await_child
from verdict import Scale, begin

HERE = Path(__file__).parent


def main() -> int:
    """Run the drill."""
    if SHIM not in os.environ:
        return start_again()
    drill = begin("surroundings", Scale(1500, 60, 10, 0.3), __doc__ or "")
    room = prepare(drill)
    try:
        drill.start = time.monotonic()  # preparation does not count
        for number in drill.numbers():
            if drill.over:
                break
            attack(room, number)
            drill.done += 1
    finally:
        shutil.rmtree(room.folder, ignore_errors=True)
    return drill.finish()


def start_again() -> int:
    """Compile the shim, and restart this command with it."""
    with tempfile.TemporaryDirectory(prefix="effnet-shim-") as name:
        library, page = Path(name) / "surroundings.so", Path(name) / "page"
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise SystemExit("surroundings: a C compiler is needed (cc, or $CC)")
        options = ["-shared", "-fPIC", "-O1", "-o", str(library)]
        subprocess.run([compiler, *options, str(HERE / "surroundings.c"), "-ldl"], check=True)
        page.write_bytes(bytes(ctypes.sizeof(Page)))
        settings = {"LD_PRELOAD": str(library), SHIM: str(page), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | settings, check=False).returncode


def attack(room: Room, number: int) -> None:
    """Do one try of a random kind."""
    random, short = room.drill.draws(number), room.drill.short
    names = {name: each.weight for name, each in COMMANDS.items() if each.weight >= 1 or not short}
    kinds = {kind: weight for kind, (weight, quick, _) in KINDS.items() if quick or not short}
    (kind,) = random.choices([*kinds], [*kinds.values()])
    (name,) = random.choices([*names], [*names.values()])
    if wrong := undisturbed(room, name):
        room.drill.fault(number, wrong)
        return
    at = make_place(room.folder / f"try{number}")
    try:
        what, found = KINDS[kind][2](room, name, at, random)
    except NotHereError as reason:
        room.drill.count(f"{kind} left out ({reason})")
    else:
        room.drill.count(kind)
        for each in found:
            room.drill.fault(number, f"{kind}, {name} ({what}): {each}")
    shutil.rmtree(at, ignore_errors=True)


def fail_writes(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A disk that becomes full, read-only or broken at some call."""
    command, log = COMMANDS[name], room.folder / "log"
    over = name in AGAIN and random.random() < 0.5
    if over:
        shutil.copytree(room.folder / f"before-{name}", at, dirs_exist_ok=True)
    under = random.choice((at, at, at, at, at / "tmpdir", at / "effnet_cache"))
    error, after = random.choice([*CAUSES]), random.randrange(room.calls[name] + 3)
    what = f"{CAUSES[error]} after {after} calls below {under.name}{', over another' if over else ''}"
    arm(room, under, error=error, after=after)
    code, said = run(room, command.words, at, log)
    reached, room.page.error = room.page.count > after, 0
    wrong = judge(room, name, at, code, said, reached, optional=under != at, cause=CAUSES[error])
    if over and digests(at, command) not in (room.before[name], room.written[name]) and " " not in command.out:
        wrong.append("what was there before is gone, and nothing whole took its place")
    if code == room.codes[name] and name not in (*AGAIN, *REPEATED):
        return what, wrong  # repeating the command would start another run
    return what, wrong + go_on(room, name, at, swept=error != errno.EROFS)


def few_descriptors(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """ulimit -n."""
    count = random.choice((16, 24, 32, 64))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, limits[1]))  # inherited by the fork
    try:
        code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wrong = judge(room, name, at, code, said, True, optional=False, cause="oo many open files")  # Too, or too
    again = code != room.codes[name] or name in (*AGAIN, *REPEATED)
    return f"{count} descriptors", wrong + (go_on(room, name, at) if again else [])


def no_locks(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A network file system without locks."""
    room.page.locks = random.choice((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
    code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    room.page.locks = 0
    return os.strerror(errno.ENOLCK), judge(room, name, at, code, said, False, optional=False, cause="")


def clock_set_back(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A clock that is set back by a day while the command runs, so that existing files are from the future."""
    room.page.clock_count, room.page.clock_after = 0, random.randrange(200)
    room.page.clock_back = 86_400
    code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    wrong = judge(room, name, at, code, said, False, optional=False, cause="")
    if name in (*AGAIN, *REPEATED):
        wrong += go_on(room, name, at)
    room.page.clock_back = 0
    return f"after {room.page.clock_after} readings", wrong


def twice(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """The same command in two processes on one folder: one must succeed, the other succeed or fail with one line."""
    pause = random.choice((0.0, random.uniform(0, 0.5)))
    words, logs = COMMANDS[name].words, (room.folder / "log", room.folder / "log2")
    children = []
    for log in logs:
        children.append(begin_command(room, words, at, log))
        time.sleep(pause)
    codes = [await_child(child) for child in children]
    wrong = damaged(at, COMMANDS[name])
    for code, log in zip(codes, logs, strict=True):
        said = log.read_text(errors="replace")
        if code not in (2, room.codes[name]) or (code == 2 and ("Traceback" in said or "unexpected" in said)):
            wrong.append(f"exit code {code}: {last_line(said)}")
    if room.codes[name] not in codes:
        wrong.append(f"neither ends well: {', '.join(last_line(log.read_text()) for log in logs)}")
    elif digests(at, COMMANDS[name]) != room.written[name]:
        wrong.append("what they wrote is not what one writes")
    return f"{pause:.2f} s apart", wrong + (go_on(room, name, at) if name in (*AGAIN, *REPEATED) else [])


def no_home(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """No home and no user name, as in a container that runs as an arbitrary user; or a home that does not exist."""
    how: dict[str, object] = {}
    home = random.choice(("-", "/nonexistent"))
    if os.getuid() == 0:
        for place in (room.folder, at, at / "tmpdir"):
            place.chmod(0o777)
        how = {"user": 54321, "group": 54321, "extra_groups": []}
    more = {"HOME": home, "XDG_CACHE_HOME": "-", "USER": "-", "LOGNAME": "-", "EFFNET_CACHE": "-"}
    try:
        code, said = start(room, name, at, more, **how)
    except PermissionError:  # Python itself is in root's home
        code, said = start(room, name, at, more)
    return f"HOME={home}", judge(room, name, at, code, said, False, optional=False, cause="")


def full_output(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """Standard output on a full disk."""
    with open("/dev/full", "w") as full:  # noqa: PTH123  # no file that is written
        code, said = start(room, name, at, {}, stdout=full)
    ends = code == 2 and last_line(said).startswith("effnet: ") and CAUSES[errno.ENOSPC] in last_line(said)
    silent = code == room.codes[name] and name in ("pack", "predict")  # which print nothing there
    wrong = [] if ends or silent else [f"exit code {code}: {' | '.join(said.splitlines()[-3:])}"]
    return "", wrong + damaged(at, COMMANDS[name])


def little_memory(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """ulimit -v or -d: the command must succeed, or fail with one line."""
    kind = random.choice((resource.RLIMIT_AS, resource.RLIMIT_DATA))
    most = int(2 ** random.uniform(27, 32))

    def limit() -> None:
        resource.setrlimit(kind, (most, most))

    code, said = start(room, name, at, {}, preexec_fn=limit)
    what = f"{'address space' if kind == resource.RLIMIT_AS else 'data'} of {most >> 20} MiB"
    if code == room.codes[name]:
        return what, judge(room, name, at, code, said, False, optional=False, cause="")
    # With too little memory for Python and its libraries to start, the error is the system's, not effnet's.
    starts = "effnet: " in said or most > 1 << 30
    wrong = damaged(at, COMMANDS[name])
    if starts and (code != 2 or "Traceback" in said or "unexpected" in said):
        wrong.append(f"exit code {code}: {' | '.join(said.splitlines()[-3:])}")
    return what, wrong + go_on(room, name, at)


def small_disk(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A disk of a few kB, which only root can mount."""
    size = int(2 ** random.uniform(12, 21)) // 4096 * 4096
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(at)], capture_output=True, check=False
    )
    if mounted.returncode:
        raise NotHereError("root alone can mount them")
    try:
        make_place(at)
        code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
        wrong = judge(room, name, at, code, said, True, optional=False, cause=CAUSES[errno.ENOSPC])
        subprocess.run(["mount", "-o", "remount,size=1g", str(at)], check=True)
        wrong += go_on(room, name, at)
    finally:
        subprocess.run(["umount", str(at)], check=True)
    return f"{size >> 10} kB", wrong


def poor_server(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A server with 64 descriptors and a hundred clients, or with photos that do not fit its memory."""
    kind, most = random.choice((resource.RLIMIT_NOFILE, resource.RLIMIT_AS)), int(2 ** random.uniform(29.5, 31))
    limit = 64 if kind == resource.RLIMIT_NOFILE else most
    what = "64 descriptors" if kind == resource.RLIMIT_NOFILE else f"address space of {most >> 20} MiB"
    words = ["serve", str(room.materials["first"]), "--port", "0", "--latency", "1s", "--grace", "100ms"]
    log = room.folder / "log"
    with (
        log.open("w") as text,
        subprocess.Popen(
            [sys.executable, "-m", "effnet", *words, "--threads", "1"],
            stderr=text,
            env=unattacked() | {"EFFNET_CACHE": str(at)},
            preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
        ) as server,
    ):
        try:
            end = time.monotonic() + HANG
            while "Next:" not in log.read_text() and server.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if server.poll() is None:
                port = int(re.findall(r"Serving at http://[\d.]+:(\d+)", log.read_text())[0])
                wrong = crowd(port, large=kind == resource.RLIMIT_AS)
                server.terminate()
                code = server.wait(HANG)
                wrong += [f"exit code {code} after SIGTERM"] if code else []
            else:
                wrong = [] if server.returncode == 2 else [f"exit code {server.returncode}"]
        finally:
            server.kill()
    said = log.read_text()
    if "Traceback" in said or "unexpected" in said:
        wrong.append(" | ".join(said.splitlines()[-3:]))
    return what, wrong


def crowd(port: int, *, large: bool) -> list[str]:
    """A hundred silent clients, or eight with a photo of 60 million pixels; then an ordinary request."""
    from concurrent.futures import ThreadPoolExecutor
    from http.client import HTTPConnection, HTTPException

    from PIL import Image

    def ask(side: int) -> int:
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), "red").save(buffer, "PNG", compress_level=1)
        client = HTTPConnection("127.0.0.1", port, timeout=HANG)
        try:
            client.request("POST", "/predict", buffer.getvalue())
            return client.getresponse().status
        except (OSError, HTTPException):
            return 0
        finally:
            client.close()

    if large:
        with ThreadPoolExecutor(8) as pool:
            statuses = {*pool.map(ask, [7_700] * 8)}
        wrong = [f"it answers {each}" for each in statuses - {200, 422, 429, 503}]
    else:
        clients, wrong = [socket.create_connection(("127.0.0.1", port), HANG) for _ in range(100)], []
        time.sleep(1)
        for client in clients:
            client.close()
    end = time.monotonic() + 60
    while (status := ask(40)) != 200 and time.monotonic() < end:
        time.sleep(0.2)
    return wrong if status == 200 else [*wrong, f"afterwards it answers {status}"]


KINDS: dict[str, tuple[float, bool, Callable[[Room, str, Path, random.Random], Found]]] = {
    # weight, whether the short form includes it, function
    "disks that fail": (80, True, fail_writes),
    "few descriptors": (4, True, few_descriptors),
    "no locks": (2, True, no_locks),
    "clock set back": (3, True, clock_set_back),
    "two at once": (4, True, twice),
    "small disks": (3, False, small_disk),
    "no home": (2, False, no_home),
    "output that fails": (2, False, full_output),
    "little memory": (6, False, little_memory),
    "small containers": (5, False, small_container),
    "poor servers": (3, False, poor_server),
}


if __name__ == "__main__":
    sys.exit(main())

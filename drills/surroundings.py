"""Surroundings: a disk that is full, read-only or broken at any write, few descriptors, little memory, no locks ...

Most tries run one command in a process of its own (a fork of this one, which has imported everything) whose disk fails
from the n-th call on that needs room: surroundings.c, loaded by LD_PRELOAD, makes open, write, fsync, mkdir, rename
and their relatives fail below the try's folder; the first write that fails writes a half. The command must end with
one line that names a file and the cause, and exit code 2, or do without where only a cache fails. Every file under a
final name must be whole, what was there before must be there or replaced by what is whole, and once there is room the
same command, or --resume, must end with the same bytes as without the attack, and leave no temporary files.

The others start a real process: without a home, with 64 descriptors, with little memory, on a disk of a few kB, with
standard output full, with the clock set back, without locks, or twice on one folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from verdict import Drill, Scale, begin

HERE = Path(__file__).parent
SHIM = "EFFNET_SHIM"
HANG = 900.0  # seconds: a hundred times what a command takes
CAUSES = {
    errno.ENOSPC: "No space left on device",
    errno.EROFS: "Read-only file system",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EIO: "Input/output error",
}


class Page(ctypes.Structure):
    """What surroundings.c reads."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("error", "after", "read_only", "count")),
        *((name, ctypes.c_int64) for name in ("locks", "clock_after", "clock_back", "clock_count")),
        ("under", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Command:
    """What a user types, in the folder of a try.

    Attributes:
        words: with names of `Materials` in braces.
        out: what it writes.
        exact: a pattern of what always has the same bytes, among the files of `out`.
        resume: the words that go on, where they are others, once a file of this name is in `out`.
        weight: how often it is tried; from 1 on in the short form, too.
    """

    words: str
    out: str
    exact: str = r".*"
    resume: tuple[str, str] | None = None
    weight: float = 0.5


COMMANDS = {
    "scale": Command("scale --macs 300M --save net.yaml", "net.yaml", weight=1),
    "check": Command("check {data} --fix clean.csv --pictures it.png", "clean.csv it.png", r".*csv", weight=1),
    "pack": Command("pack {data} shards --shard-size 30kB", "shards", weight=1),
    "predict": Command("predict {photos} --model {first} --out answers --part 2", "answers", weight=1),
    "explain": Command("explain {photos} --model {first} --out maps", "maps", weight=0.5),
    "val": Command(
        "val {first} {data} --split all --out figures --report page.html", "figures page.html", r".*csv", weight=0.2
    ),
    "onnx": Command("export {first} --format onnx --out net.onnx", "net.onnx", weight=0.5),
    "openvino": Command("export {first} --format openvino --out net", "net", r".*bin", weight=0.3),
    "triton": Command("export {first} --server triton --out net", "net", r".*(onnx|txt)", weight=0.3),
    "to-file": Command("convert {first} --to torchvision --out net.pth", "net.pth", r"-", weight=0.4),
    "to-bundle": Command("convert {first} --to bundle --out copy", "copy", r".*safetensors", weight=0.5),
    "train": Command(
        "train {data} --model {spec} --epochs 2 --batch 8 --recipe scratch --workers 0 --out run",
        "run",
        r"(best/.*safetensors|split.csv)",
        ("last.ckpt", "train --resume run"),
        weight=0.3,
    ),
    "search": Command(
        "search {data} --from b0 --resolution 24 --triple 1.2,1.1,1.15 --triple 1.6,1.1,1 --rungs 1 --seeds 1 "
        "--finalists 1 --epochs 1 --workers 1 --out found",
        "found",
        r"(rule.yaml|split.csv|candidates.csv)",
        ("trials.csv", "search --resume found"),
        weight=0.05,
    ),
    "fit": Command(
        "fit {data} --macs 20M --minutes 0.05 --resolution 32 --out fitted",
        "fitted",
        r"split.csv",
        ("plan.yaml", "fit --resume fitted"),
        weight=0.03,
    ),
}
REPEATED = ("check", "pack", "predict", "train", "search", "fit")  # go on, or find that nothing is missing
AGAIN = ("scale", "onnx", "openvino", "to-file", "to-bundle", "val")  # replace what is there


@dataclass
class Room:
    """Where tries take place: materials, the shim's page, and what commands write undisturbed."""

    drill: Drill
    folder: Path
    materials: dict[str, Path]
    page: Page
    calls: dict[str, int]
    codes: dict[str, int]
    written: dict[str, dict[str, str]]
    before: dict[str, dict[str, str]]


def main() -> int:
    """Run the drill."""
    if SHIM not in os.environ:
        return start_again()
    drill = begin("surroundings", Scale(1500, 60, 10, 0.3), __doc__ or "")
    room = prepare(drill)
    try:
        short = "--short" in sys.argv
        drill.start = time.monotonic()  # what comes before is not the attack
        for number in drill.numbers():
            if drill.over:
                break
            attack(room, number, short)
            drill.done += 1
    finally:
        shutil.rmtree(room.folder, ignore_errors=True)
    return drill.finish()


def start_again() -> int:
    """Compile the shim, and start this command under it."""
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


def prepare(drill: Drill) -> Room:
    """Draw photos, make two bundles, and run every command undisturbed."""
    with open(os.environ[SHIM], "r+b") as file:  # noqa: PTH123  # as mmap wants it
        page = Page.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Page)))
    folder = Path(tempfile.mkdtemp(prefix="effnet-surroundings-")).resolve()
    names = ("photos", "data", "first", "second", "spec")
    materials = {name: folder / "materials" / (f"{name}.yaml" if name == "spec" else name) for name in names}
    if (code := in_child(lambda: make_materials(materials), folder, folder / "log")) != 0:
        raise SystemExit(f"surroundings: no materials (exit code {code}):\n{(folder / 'log').read_text()}")
    import_all()
    return Room(drill, folder, materials, page, {}, {}, {}, {})


def make_materials(at: dict[str, Path]) -> int:
    """Photos, data of two classes, two bundles and a network."""
    import numpy as np
    import torch
    from PIL import Image

    import effnet
    from effnet.arch.specfile import spec_text

    draws = np.random.default_rng(0)
    for name, count in (("photos", 7), ("data/dark", 12), ("data/light", 12)):
        place = at["photos"].parent / name
        place.mkdir(parents=True)
        for index in range(count):
            light = 128 * (name == "data/light")
            pixels = draws.integers(light, light + 128, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.png")
    (at["photos"] / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    shutil.copy(at["data"] / "dark" / "0.png", at["data"] / "dark" / "copy.png")
    network = effnet.spec("b0", width=0.25, depth=0.3, resolution=32, num_classes=2)
    at["spec"].write_text(spec_text(network))
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        effnet.save(effnet.EfficientNet(network), at[name], classes=["dark", "light"])
    return 0


def import_all() -> None:
    """Import what commands import when they run, so that a fork of this process starts at once."""
    import torch

    from effnet.cli import COMMANDS as COMMANDS_OF_EFFNET

    torch.set_num_threads(1)
    for module, _, _ in COMMANDS_OF_EFFNET.values():
        __import__(f"effnet.{module}")
    for module in ("training.train", "training.loop", "exporting.export", "reporting.page", "weights.convert"):
        __import__(f"effnet.{module}")
    for module in ("matplotlib.pyplot", "onnx", "openvino", "onnxruntime", "jinja2", "rich.table", "rich.progress"):
        __import__(module)


def make_place(at: Path) -> Path:
    """The folder of a try, with one for temporary files."""
    (at / "tmpdir").mkdir(parents=True)
    return at


# One command in a fork


def in_child(work: Callable[[], int], at: Path, log: Path) -> int:
    """Do some work in a fork, in a folder; its exit code, or minus the signal that ended it, as subprocess has it."""
    return await_child(begin_child(work, at, log))


def begin_child(work: Callable[[], int], at: Path, log: Path) -> int:
    """Start some work in a fork, in a folder; the process's number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 99
    try:
        text = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(text, 1)
        os.dup2(text, 2)
        os.chdir(at)
        for name in ("TMPDIR", "EFFNET_CACHE"):
            os.environ[name] = str(at / name.lower())
        tempfile.tempdir = None
        code = work()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def await_child(child: int) -> int:
    """The exit code of a fork; -1000 where it hangs."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def run(room: Room, words: str, at: Path, log: Path) -> tuple[int, str]:
    """Run a command of effnet in a folder; its exit code and what it said."""
    from effnet.cli import main as command

    code = in_child(lambda: command(typed(room, words)) or 0, at, log)
    return code, log.read_text(errors="replace")


def typed(room: Room, words: str) -> list[str]:
    """The words with the paths of the materials."""
    return [word.format(**room.materials) for word in words.split()]


def undisturbed(room: Room, name: str) -> str:
    """Note how many calls a command makes that need room, and what it writes, also about something else.

    What is wrong with it already is returned.
    """
    if name in room.written:
        return ""
    command = COMMANDS[name]
    for kept, which in ((room.before, "before"), (room.written, "right")):
        if which == "before" and name not in AGAIN:
            continue
        at, log = make_place(room.folder / f"{which}-{name}"), room.folder / "log"
        arm(room, at, error=errno.ENOSPC, after=2**60)
        code, said = run(room, command.words if which == "right" else second(command.words), at, log)
        room.page.error = 0
        if code not in (0, 1):  # 1: a photo is broken
            shutil.rmtree(at)
            return f"{name} ends with {code}, undisturbed: {last_line(said)}"
        room.calls[name], room.codes[name], kept[name] = room.page.count, code, digests(at, command)
    return ""


def second(words: str) -> str:
    """The same command about something else."""
    return words.replace("{first}", "{second}").replace("300M", "500M")


def arm(room: Room, under: Path, *, error: int, after: int) -> None:
    """Let calls below a folder fail."""
    page = room.page
    page.under, page.after, page.count, page.read_only = str(under).encode(), after, 0, int(error == errno.EROFS)
    page.error = error


def digests(at: Path, command: Command) -> dict[str, str]:
    """The content of what a command wrote, by the files' names."""
    found = {}
    for out in command.out.split():
        files = [at / out] if (at / out).is_file() else sorted((at / out).rglob("*"))
        for file in files:
            name = str(file.relative_to(at / out)) if file != at / out else out
            if file.is_file() and not is_hidden(file, at):
                exact = re.fullmatch(command.exact, name)
                found[f"{out}:{name}"] = hashlib.sha256(file.read_bytes()).hexdigest() if exact else ""
    return found


# The tries


def attack(room: Room, number: int, short: bool) -> None:
    """One try of a kind that is drawn."""
    random = room.drill.draws(number)
    names = {name: each.weight for name, each in COMMANDS.items() if each.weight >= 1 or not short}
    kinds = {kind: weight for kind, (weight, quick, _) in KINDS.items() if quick or not short}
    (kind,) = random.choices([*kinds], [*kinds.values()])
    (name,) = random.choices([*names], [*names.values()])
    if wrong := undisturbed(room, name):
        room.drill.fault(number, wrong)
        return
    at = make_place(room.folder / f"try{number}")
    what, found = KINDS[kind][2](room, name, at, random)
    room.drill.count(kind)
    for each in found:
        room.drill.fault(number, f"{kind}, {name} ({what}): {each}")
    shutil.rmtree(at, ignore_errors=True)


Found = tuple[str, list[str]]  # what was done, and what is wrong


def fail_writes(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A disk that is full, read-only or broken from some call on."""
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
        return what, wrong  # given again, it would begin another
    if error == errno.EROFS and name == "explain":
        return what, wrong  # what it had drawn could not be removed from there, and it does not go on
    return what, wrong + go_on(room, name, at, swept=error != errno.EROFS)


def judge(
    room: Room, name: str, at: Path, code: int, said: str, reached: bool, *, optional: bool, cause: str
) -> list[str]:
    """Whether a command ended as it should: well, or with one line."""
    command, wrong = COMMANDS[name], damaged(at, COMMANDS[name])
    if code == -1000:
        return [f"it hangs: {last_line(said)}"]
    if code == room.codes[name]:
        if digests(at, command) != room.written[name]:
            wrong.append(f"exit code {code}, and what it wrote is not what it should be")
        return wrong
    if code != 2 or not reached:
        return [*wrong, f"exit code {code}: {last_line(said)}"]
    if "Traceback" in said or "unexpected" in said or not last_line(said).startswith("effnet: "):
        wrong.append(f"not one line: {' | '.join(said.splitlines()[-4:])}")
    elif cause not in said:
        wrong.append(f"its line does not say {cause!r}: {last_line(said)}")
    elif not any(part in last_line(said) for part in (*command.out.split(), str(at))):
        wrong.append(f"its line names no file: {last_line(said)}")
    return wrong


def go_on(room: Room, name: str, at: Path, *, swept: bool = True) -> list[str]:
    """Give the command again, with room; what is wrong then, also what was not `swept` away."""
    command, words = COMMANDS[name], COMMANDS[name].words
    if command.resume and (at / command.out / command.resume[0]).exists():
        words = command.resume[1]
    code, said = run(room, words, at, room.folder / "log")
    if code != room.codes[name]:
        return [f"given again ({words.split()[0:2]}), it ends with {code}: {last_line(said)}"]
    wrong = damaged(at, command)
    found, right = digests(at, command), room.written[name]
    if found != right:
        others = sorted({each for each, _ in found.items() ^ right.items()})
        wrong.append(f"given again, it wrote something else: {', '.join(others[:4])}")
    hidden = [str(each.relative_to(at)) for each in at.rglob(".*") if "tmpdir" not in each.parts]
    return wrong + ([f"left behind: {', '.join(hidden[:4])}"] if hidden and swept else [])


def damaged(at: Path, command: Command) -> list[str]:
    """The files under final names that are not whole."""
    found = []
    for out in command.out.split():
        for file in [at / out] if (at / out).is_file() else sorted((at / out).rglob("*")):
            if not file.is_file() or is_hidden(file, at):
                continue
            try:
                open_whole(file)
            except Exception as error:
                found.append(f"{file.relative_to(at)} is damaged: {type(error).__name__} {error}")
    return found


def is_hidden(file: Path, at: Path) -> bool:
    """Whether it is below a temporary folder of effnet's."""
    return any(part.startswith(".") for part in file.relative_to(at).parts)


def open_whole(file: Path) -> None:
    """Raise an error where a file was cut short."""
    content, suffix = file.read_bytes(), file.suffix
    if suffix in (".json", ".yaml", ".csv", ".jsonl", ".txt", ".pbtxt", ".md") and not content.endswith(b"\n"):
        json.loads(content)  # json.dumps ends without a line
    if suffix == ".html" and b"</html>" not in content[-20:]:
        raise ValueError("it does not end")
    if suffix in (".png", ".jpg"):
        from PIL import Image

        Image.open(file).load()
    if suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        last = max(each["data_offsets"][1] for key, each in json.loads(content[8 : 8 + size]).items() if key[0] != "_")
        if len(content) != 8 + size + last:
            raise ValueError("it was cut short")
    if suffix in (".pth", ".pt2"):
        zipfile.ZipFile(file).testzip()
    if suffix == ".ckpt":
        head, _, payload = content.partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != head.split()[-1]:
            raise ValueError("its sha256 is another")
    if suffix == ".tar" and (len(content) % 512 or content[-1024:] != bytes(1024)):
        raise ValueError("it was cut short")
    if suffix == ".onnx":
        import onnx

        onnx.load_from_string(content)
    if suffix == ".xml" and not content.rstrip().endswith(b">"):
        raise ValueError("it was cut short")


def last_line(said: str) -> str:
    """The last line that was said, of any length a person reads."""
    return (said.strip().splitlines() or [""])[-1][:300]


def few_descriptors(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """ulimit -n."""
    count = random.choice((16, 24, 32, 64))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, limits[1]))  # a fork has this process's
    try:
        code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wrong = judge(room, name, at, code, said, True, optional=False, cause="oo many open files")
    return f"{count} descriptors", wrong + go_on(room, name, at)


def no_locks(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A network file system that has no locks."""
    room.page.locks = random.choice((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
    code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    room.page.locks = 0
    return os.strerror(errno.ENOLCK), judge(room, name, at, code, said, False, optional=False, cause="")


def clock_set_back(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A clock that is set back by a day while the command runs; then what is there is of tomorrow."""
    room.page.clock_count, room.page.clock_after = 0, random.randrange(200)
    room.page.clock_back = 86_400
    code, said = run(room, COMMANDS[name].words, at, room.folder / "log")
    wrong = judge(room, name, at, code, said, False, optional=False, cause="")
    if name in (*AGAIN, *REPEATED):
        wrong += go_on(room, name, at)
    room.page.clock_back = 0
    return f"after {room.page.clock_after} readings", wrong


def twice(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """The same command in two processes on one folder: one of them succeeds, the other too or with one line."""
    from effnet.cli import main as command

    pause = random.choice((0.0, random.uniform(0, 0.5)))
    words, logs = COMMANDS[name].words, (room.folder / "log", room.folder / "log2")
    children = []
    for log in logs:
        children.append(begin_child(lambda: command(typed(room, words)) or 0, at, log))
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


def start(room: Room, name: str, at: Path, more: dict[str, str], **how: object) -> tuple[int, str]:
    """Start a command as a user does; its exit code and what it said."""
    settings = os.environ | {"TMPDIR": str(at / "tmpdir"), "EFFNET_CACHE": str(at / "effnet_cache")} | more
    settings = {key: value for key, value in settings.items() if value != "-" and key not in ("LD_PRELOAD", SHIM)}
    words = [sys.executable, "-m", "effnet", *typed(room, COMMANDS[name].words)]
    how = {"stdout": subprocess.PIPE} | how
    try:
        ended = subprocess.run(
            words,
            stderr=subprocess.PIPE,
            text=True,
            cwd=at,
            env=settings,
            check=False,
            timeout=HANG,
            **how,
        )
    except subprocess.TimeoutExpired:
        return -1000, ""
    return ended.returncode, ended.stderr


def no_home(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """No home and no name, as in a container that runs as any user; or a home that is not there."""
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
    """Standard output goes to a disk that is full."""
    with open("/dev/full", "w") as full:  # noqa: PTH123  # no file that is written
        code, said = start(room, name, at, {}, stdout=full)
    ends = code == 2 and last_line(said).startswith("effnet: ") and CAUSES[errno.ENOSPC] in last_line(said)
    silent = code == room.codes[name] and name in ("pack", "predict")  # which print nothing there
    wrong = [] if ends or silent else [f"exit code {code}: {' | '.join(said.splitlines()[-3:])}"]
    return "", wrong + damaged(at, COMMANDS[name])


def little_memory(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """ulimit -v or -d: it ends well, or with one line."""
    kind = random.choice((resource.RLIMIT_AS, resource.RLIMIT_DATA))
    most = int(2 ** random.uniform(27, 32))

    def limit() -> None:
        resource.setrlimit(kind, (most, most))

    code, said = start(room, name, at, {}, preexec_fn=limit)
    what = f"{'address space' if kind == resource.RLIMIT_AS else 'data'} of {most >> 20} MiB"
    if code == room.codes[name]:
        return what, judge(room, name, at, code, said, False, optional=False, cause="")
    # Below what Python and its libraries need to start, the system speaks, not effnet.
    starts = "effnet: " in said or most > 1 << 30
    wrong = damaged(at, COMMANDS[name])
    if starts and (code != 2 or "Traceback" in said or "unexpected" in said):
        wrong.append(f"exit code {code}: {' | '.join(said.splitlines()[-3:])}")
    return what, wrong + go_on(room, name, at)


def small_disk(room: Room, name: str, at: Path, random: random.Random) -> Found:
    """A disk of a few kB, as root can mount one."""
    size = int(2 ** random.uniform(12, 21)) // 4096 * 4096
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(at)], capture_output=True, check=False
    )
    if mounted.returncode:
        return "not root", []
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
    """A server with 64 descriptors and a hundred clients, or with photos that do not fit into its memory."""
    kind, most = random.choice((resource.RLIMIT_NOFILE, resource.RLIMIT_AS)), int(2 ** random.uniform(29.5, 31))
    limit = 64 if kind == resource.RLIMIT_NOFILE else most
    what = "64 descriptors" if kind == resource.RLIMIT_NOFILE else f"address space of {most >> 20} MiB"
    words = ["serve", str(room.materials["first"]), "--port", "0", "--latency", "1s", "--grace", "100ms"]
    settings = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", SHIM)}
    log = room.folder / "log"
    with (
        log.open("w") as text,
        subprocess.Popen(
            [sys.executable, "-m", "effnet", *words, "--threads", "1"],
            stderr=text,
            env=settings | {"EFFNET_CACHE": str(at)},
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
    """A hundred silent clients, or eight with a photo of 60 million pixels; then one who asks as usual."""
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
    # weight, whether it is in the short form
    "disks that fail": (80, True, fail_writes),
    "few descriptors": (4, True, few_descriptors),
    "no locks": (2, True, no_locks),
    "clock set back": (3, True, clock_set_back),
    "two at once": (4, True, twice),
    "small disks": (3, False, small_disk),
    "no home": (2, False, no_home),
    "output that fails": (2, False, full_output),
    "little memory": (6, False, little_memory),
    "poor servers": (3, False, poor_server),
}


if __name__ == "__main__":
    sys.exit(main())

"""The commands that the surroundings drill attacks: their undisturbed results, and checks of what they leave."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from killing.processes import HANG, await_child, begin, fork_search_workers, in_child, run_effnet
from killing.whole import find_damage
from verdict import Drill

SHIM = "EFFNET_SHIM"
CAUSES = {
    errno.ENOSPC: "No space left on device",
    errno.EROFS: "Read-only file system",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EIO: "Input/output error",
}
Found = tuple[str, list[str]]  # what was done, and the faults


class NotHereError(Exception):
    """This machine does not allow such a try; the message says why."""


class Page(ctypes.Structure):
    """The shared page that surroundings.c reads."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("error", "after", "read_only", "count")),
        *((name, ctypes.c_int64) for name in ("locks", "clock_after", "clock_back", "clock_count")),
        ("under", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Command:
    """A command line, run in the folder of a try.

    Attributes:
        words: the command line, with names of `Room.materials` in braces.
        out: the files and folders that it writes.
        exact: a pattern for the files of `out` that always have the same bytes.
        resume: a file name and the command that resumes once `out` has that file, if it is another command.
        weight: how often it is tried; 1 and more also in the short form.
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
    "int8": Command("export {first} {data} --precision int8 --max-drop 60 --out net", "net", r".*bin", weight=0.3),
    "to-file": Command("convert {first} --to torchvision --out net.pth", "net.pth", r"-", weight=0.4),
    "to-bundle": Command("convert {first} --to bundle --out copy", "copy", r".*safetensors", weight=0.5),
    "train": Command(
        "train {data} --model {spec} --epochs 2 --batch 8 --recipe scratch --workers 0 --out run",
        "run",
        r"(best/.*safetensors|split.csv)",
        ("last.ckpt", "train --resume run"),
        weight=0.3,
    ),
    "train-with-worker": Command(
        "train {data} --model {spec} --epochs 2 --batch 8 --recipe scratch --workers 1 --out run",
        "run",
        r"(best/.*safetensors|split.csv)",
        ("last.ckpt", "train --resume run"),
        weight=0.3,
    ),
    "train-b0": Command(  # takes 880 MB; with less it splits batches and gives another result
        "train {data} --model b0 --resolution 160 --epochs 1 --batch 16 --recipe scratch --workers 0 --out run",
        "run",
        r"split.csv",
        ("last.ckpt", "train --resume run"),
        weight=0,  # only where memory is limited
    ),
    "bench": Command("bench {first} --keep --batch 1 --rounds 3 --threads 1", "effnet_cache", r"-", weight=0.15),
    "search": Command(
        "search {data} --from b0 --resolution 24 --triple 1.2,1.1,1.15 --triple 1.6,1.1,1 --rungs 1 --seeds 1 "
        "--finalists 1 --epochs 1 --workers 1 --out found",
        "found",
        r"(rule.yaml|split.csv|candidates.csv)",
        ("trials.csv", "search --resume found"),
        weight=0.5,
    ),
    "fit": Command(
        "fit {data} --macs 2M --minutes 0.02 --resolution 32 --out fitted",
        "fitted",
        r"split.csv",
        ("plan.yaml", "fit --resume fitted"),
        weight=0.5,
    ),
}
REPEATED = (  # a repeated command resumes, or finds that nothing is missing
    *("check", "pack", "predict", "bench", "search", "fit"),
    *("train", "train-with-worker", "train-b0"),
)
GROWING = ("trials.csv",)  # a line is added per trial; --resume removes half a line
AGAIN = ("scale", "onnx", "openvino", "int8", "to-file", "to-bundle", "val")  # a repeated command replaces its output


@dataclass
class Room:
    """The environment of tries: materials, the shim's page, and the undisturbed output of commands."""

    drill: Drill
    folder: Path
    materials: dict[str, Path]
    page: Page
    calls: dict[str, int]
    codes: dict[str, int]
    written: dict[str, dict[str, str]]
    before: dict[str, dict[str, str]]


def prepare(drill: Drill) -> Room:
    """Make photos and two bundles, and run every command undisturbed."""
    with open(os.environ[SHIM], "r+b") as file:  # noqa: PTH123  # mmap needs a descriptor
        page = Page.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Page)))
    folder = Path(tempfile.mkdtemp(prefix="effnet-surroundings-")).resolve()
    names = ("photos", "data", "first", "second", "spec")
    materials = {name: folder / "materials" / (f"{name}.yaml" if name == "spec" else name) for name in names}
    if (code := in_child(lambda: make_materials(materials), folder, folder / "log")) != 0:
        raise SystemExit(f"surroundings: no materials (exit code {code}):\n{(folder / 'log').read_text()}")
    import_all()
    return Room(drill, folder, materials, page, {}, {}, {}, {})


def make_materials(at: dict[str, Path]) -> int:
    """Make photos, a data set of two classes, two bundles and a network."""
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
    """Import what commands import when they run, so that forks of this process start at once."""
    import torch

    from effnet.cli import COMMANDS as COMMANDS_OF_EFFNET

    torch.set_num_threads(1)
    fork_search_workers()
    for module, _, _ in COMMANDS_OF_EFFNET.values():
        __import__(f"effnet.{module}")
    for module in ("training.train", "training.loop", "exporting.export", "reporting.page", "weights.convert"):
        __import__(f"effnet.{module}")
    for module in ("matplotlib.pyplot", "onnx", "openvino", "onnxruntime", "jinja2", "rich.table", "rich.progress"):
        __import__(module)


def make_place(at: Path) -> Path:
    """Make the folder of a try, with one for temporary files."""
    (at / "tmpdir").mkdir(parents=True)
    return at


# One command in a fork


def begin_command(room: Room, words: str, at: Path, log: Path) -> int:
    """Start an effnet command in a folder; return its pid."""
    log.unlink(missing_ok=True)
    folders = {name: str(at / name.lower()) for name in ("TMPDIR", "EFFNET_CACHE")}
    return begin(lambda: run_effnet(typed(room, words)), at, log, folders)


def run(room: Room, words: str, at: Path, log: Path) -> tuple[int, str]:
    """Run an effnet command in a folder; return its exit code and output."""
    code = await_child(begin_command(room, words, at, log))
    return code, log.read_text(errors="replace")


def start(room: Room, name: str, at: Path, more: dict[str, str], **how: object) -> tuple[int, str]:
    """Run a command as a user does, in a new process without the shim; return its exit code and output.

    Args:
        room: the materials.
        name: the name of the command.
        at: the folder of the try.
        more: environment variables; the value "-" removes one.
        how: further arguments of subprocess.run.
    """
    settings = unattacked() | {"TMPDIR": str(at / "tmpdir"), "EFFNET_CACHE": str(at / "effnet_cache")} | more
    settings = {key: value for key, value in settings.items() if value != "-"}
    words = [sys.executable, "-m", "effnet", *typed(room, COMMANDS[name].words)]
    how = {"stdout": subprocess.PIPE} | how
    try:
        ended = subprocess.run(
            words, stderr=subprocess.PIPE, text=True, cwd=at, env=settings, check=False, timeout=HANG, **how
        )
    except subprocess.TimeoutExpired:
        return -1000, ""
    return ended.returncode, ended.stderr


def unattacked() -> dict[str, str]:
    """The environment without the shim."""
    return {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", SHIM)}


def typed(room: Room, words: str) -> list[str]:
    """The words of a command with the paths of the materials."""
    return [word.format(**room.materials) for word in words.split()]


def undisturbed(room: Room, name: str) -> str:
    """Record how many calls of a command need space, and what it writes, also for another input.

    Returns:
        What is wrong even without an attack, or "".
    """
    if name in room.written:
        return ""
    command = COMMANDS[name]
    for kept, which in ((room.before, "before"), (room.written, "right")):
        if which == "before" and name not in AGAIN:
            continue
        at, log = make_place(room.folder / f"{which}-{name}"), room.folder / "log"
        arm(room, at, error=errno.ENOSPC, after=2**60)
        code, said = run(room, command.words if which == "right" else about_another(command.words), at, log)
        room.page.error = 0
        if code not in (0, 1):  # 1: a photo is broken
            shutil.rmtree(at)
            return f"{name} ends with {code}, undisturbed: {last_line(said)}"
        room.calls[name], room.codes[name], kept[name] = room.page.count, code, digests(at, command)
    return ""


def about_another(words: str) -> str:
    """The same command for another input."""
    return words.replace("{first}", "{second}").replace("300M", "500M")


def arm(room: Room, under: Path, *, error: int, after: int) -> None:
    """Make calls below a folder fail."""
    page = room.page
    page.under, page.after, page.count, page.read_only = str(under).encode(), after, 0, int(error == errno.EROFS)
    page.error = error


def digests(at: Path, command: Command) -> dict[str, str]:
    """The contents of the files that a command wrote, by name."""
    found = {}
    for out in command.out.split():
        files = [at / out] if (at / out).is_file() else sorted((at / out).rglob("*"))
        for file in files:
            name = str(file.relative_to(at / out)) if file != at / out else out
            if file.is_file() and not is_hidden(file, at):
                exact = re.fullmatch(command.exact, name)
                name = re.sub(r"[0-9a-f]{24}", "*", name)  # what bench keeps: a hash that includes the memory's limit
                found[f"{out}:{name}"] = hashlib.sha256(file.read_bytes()).hexdigest() if exact else ""
    return found


# The tries


def judge(
    room: Room, name: str, at: Path, code: int, said: str, reached: bool, *, optional: bool, cause: str
) -> list[str]:
    """Check that a command succeeded, or failed with one line; return the faults."""
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
    elif not any(part in last_line(said) for part in (*command.out.split(), str(at), "ulimit -n")):
        wrong.append(f"its line names no file: {last_line(said)}")
    return wrong


def go_on(room: Room, name: str, at: Path, *, swept: bool = True) -> list[str]:
    """Repeat or resume the command with space; return the faults, including files left behind if `swept`."""
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
    """The damage in the files that a command wrote."""
    outs = [at / out for out in command.out.split() if (at / out).exists()]
    return [each for out in outs for each in find_damage(out, growing=GROWING)]


def is_hidden(file: Path, at: Path) -> bool:
    """Whether a file is below one of effnet's temporary folders."""
    return any(part.startswith(".") for part in file.relative_to(at).parts)


def last_line(said: str) -> str:
    """The last line of the output, shortened."""
    return (said.strip().splitlines() or [""])[-1][:300]

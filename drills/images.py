"""Damaged and malicious images, given to predict, check, training's reader and the server.

    python drills/images.py [--seed 0] [--tries 10000] [--minutes 60] [--short] [--only NUMBER]

Every image must get a finite answer or a reason in one line, the same from effnet predict, the server and the Python
functions; nothing may crash, hang or take more memory than its pixels justify.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attacks.bombs import bomb
from attacks.photos import change, cuts, seeds
from attacks.watched import HANG, Watched
from verdict import Drill, Scale, begin

SCALE = Scale(tries=10_000, minutes=60, short_tries=150, short_minutes=1)
BATCH = 100  # images per command
BOMBS, CUTS = 0.03, 0.2  # shares of the tries
SLOW = 10.0  # most seconds of processor time per file
BYTES_PER_PIXEL, SPARE_MB = 14, 150  # most memory for a photo
SERVED_ONLY = "are served"  # in the message of the server's own pixel limit


@contextmanager
def server(log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run effnet serve; yields the process and its port."""
    words = [
        sys.executable,
        "-m",
        "effnet",
        "serve",
        "lite0",
        "--port",
        "0",
        "--max-upload",
        "500MB",
        "--latency",
        "10s",
    ]
    with log.open("wb") as stream, subprocess.Popen(words, stdout=stream, stderr=stream) as process:
        try:
            for _ in range(int(10 * HANG)):
                if found := re.search(rb"Serving at http://[^:]+:(\d+)", log.read_bytes()):
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {log.read_text()}")
                time.sleep(0.1)
            assert found
            yield process, int(found[1])
        finally:
            process.terminate()


def ask(port: int, files: list[Path], query: str = "") -> Any:
    """The server's answer to a form with several files."""
    mark = b"----drill"
    body = b"".join(
        b'--%s\r\ncontent-disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (mark, f.name.encode(), f.read_bytes())
        for f in files
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    kind = {"content-type": f"multipart/form-data; boundary={mark.decode()}"}
    try:
        connection.request("POST", f"/predict{query}", body + b"--%s--\r\n" % mark, kind)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run an effnet command."""
    return subprocess.run(
        [sys.executable, "-m", "effnet", *words], capture_output=True, text=True, timeout=10 * HANG, check=False
    )


def make(drill: Drill, number: int, files: dict[str, list[bytes]], short: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The suffix and the bytes of a try."""
    draw = drill.draws(number)
    kind = draw.random()
    if kind < BOMBS:
        return bomb(draw)
    if kind < BOMBS + CUTS:
        return short[number * 7919 % len(short)]  # a prime, so that every cut is used
    name = draw.choice(sorted(files))
    return name, change(name, draw.choice(files[name]), files[name], draw)


def check_reader(drill: Drill, number: int, file: Path, reader: Watched) -> str | None:
    """Read a file with the Python functions; return why it was refused, or None if the process broke."""
    told = reader.tell(str(file))
    if isinstance(told, str):
        drill.fault(number, f"{file.name} {told}")
        return None
    drill.count("refused" if told["refused"] else "answered")
    allowed = SPARE_MB + (BYTES_PER_PIXEL * told["pixels"] + 40 * file.stat().st_size) / 1e6
    for bad, what in (
        (told["raised"], f"raises {told['raised']}"),
        (told["differs"], f"is read otherwise in training: {told['differs']}"),
        ("\n" in told["refused"], f"is refused in several lines: {told['refused']!r}"),
        (told["seconds"] > SLOW, f"takes {told['seconds']:.1f} s"),
        (told["mb"] > allowed, f"of {told['pixels']:,} pixels takes {told['mb']:,.0f} MB"),
    ):
        if bad:
            drill.fault(number, f"{file.name} {what}")
    slowest["seconds"] = max(slowest["seconds"], told["seconds"])
    slowest["mb"] = max(slowest["mb"], told["mb"])
    return str(told["refused"])


def check_predict(drill: Drill, folder: Path, files: dict[Path, int]) -> dict[str, Any]:
    """Run effnet predict on the folder, which must print a line per file; return the lines by file name."""
    done = command("predict", "--json", str(folder))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    loud = "Traceback" in done.stderr or "Warning" in done.stderr
    if done.returncode not in (0, 1) or loud or len(lines) != len(files):
        end = done.stderr.strip().splitlines()[-1:]
        drill.fault(min(files.values()), f"effnet predict gave {len(lines)} lines, exit code {done.returncode} {end}")
    by_name = {Path(line["file"]).name: line for line in lines}
    for file, number in files.items():
        line = by_name.get(file.name, {})
        scores = line.get("predictions", [{"probability": 0.0}])
        if "\n" in line.get("error", "") or not all(math.isfinite(each["probability"]) for each in scores):
            drill.fault(number, f"{file.name} is answered with {line}")
    return by_name


def check_check(drill: Drill, folder: Path, files: dict[Path, int], refusals: dict[str, str]) -> None:
    """Run effnet check on the folder, which must report what predict refuses."""
    done = command("check", "--json", str(folder.parent))
    if done.returncode not in (0, 1) or not done.stdout:
        end = done.stderr.strip().splitlines()[-1:]
        drill.fault(min(files.values()), f"effnet check ended with code {done.returncode} {end}")
        return
    found = [each for each in json.loads(done.stdout)["findings"] if each["kind"] == "unreadable"]
    named = {Path(name).name for each in found for name in each["files"]}
    for file, number in files.items():
        if file.stat().st_size and (file.name in named) != bool(refusals.get(file.name)):
            drill.fault(number, f"{file.name}: predict says {refusals.get(file.name)!r}, check {file.name in named}")


def check_server(drill: Drill, port: int, files: dict[Path, int], predicted: dict[str, Any]) -> None:
    """Send the same images to the server, which must give the same answers."""
    try:
        status, answer = ask(port, [*files])
        explained = ask(port, [*files][::10], "?explain=true")
    except (OSError, ValueError, http.client.HTTPException) as error:
        drill.fault(min(files.values()), f"the server does not answer: {type(error).__name__} {error}")
        return
    if status not in (200, 422) or explained[0] not in (200, 422):
        drill.fault(min(files.values()), f"the server answers {status} {answer}, explaining {explained}"[:300])
        return
    for (file, number), told in zip(files.items(), answer["images"], strict=True):
        line = {name: value for name, value in predicted.get(file.name, {}).items() if name != "file"}
        mine = {name: value for name, value in told.items() if name != "file"}
        if mine != line and SERVED_ONLY not in mine.get("error", ""):
            drill.fault(number, f"{file.name}: predict says {line}, the server {mine}"[:400])


def attack(drill: Drill, port: int, reader: Watched, folder: Path, images: dict[str, bytes], first: int) -> None:
    """Give some images, numbered from `first` on, to the reader, the commands and the server."""
    folder.mkdir()
    made: dict[Path, int] = {}
    refusals: dict[str, str] = {}
    for number, (name, content) in enumerate(images.items(), first):
        (file := folder / name).write_bytes(content)
        refused = check_reader(drill, number, file, reader)
        if refused is None:
            file.unlink()
            continue
        made[file], refusals[name] = number, refused
        drill.done += 1
    if not made:
        return
    predicted = check_predict(drill, folder, made)
    for file, number in made.items():
        if predicted.get(file.name, {}).get("error", "") != refusals[file.name]:
            drill.fault(number, f"{file.name}: {refusals[file.name]!r}, but {predicted.get(file.name)}")
    check_check(drill, folder, made, refusals)
    check_server(drill, port, made, predicted)


def main() -> int:
    """Run the drill and return its exit code."""
    drill = begin("images", SCALE, __doc__)
    files = seeds()
    short, numbers = cuts(files), drill.numbers()
    reader = Watched("reader")
    with tempfile.TemporaryDirectory() as place:
        os.environ["EFFNET_CACHE"] = f"{place}/cache"
        with server(Path(place) / "log") as (process, port):
            for batch in (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)):
                if drill.over:
                    break
                made = {number: make(drill, number, files, short) for number in batch}
                images = {f"{number:06}.{suffix}": content for number, (suffix, content) in made.items()}
                with tempfile.TemporaryDirectory(dir=place) as folder:
                    attack(drill, port, reader, Path(folder) / "class", images, batch[0])
            if process.poll() is not None:
                drill.fault(numbers[0], f"the server ended with code {process.returncode}")
            peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        reader.close()
    served = int(peak[1]) // 1000 if peak else 0
    print(f"slowest file {slowest['seconds']:.2f} s, largest {slowest['mb']:,.0f} MB, the server {served:,} MB")
    return drill.finish()


slowest = {"seconds": 0.0, "mb": 0.0}

if __name__ == "__main__":
    sys.exit(main())

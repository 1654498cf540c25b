"""Network: every command in an isolated network namespace, where each attempt to reach the outside is counted.

Each try is one command, started as a user would. Two monitors watch it: a hook in each of its Python processes records
every address that a socket binds or connects to and every name that is looked up, and the kernel counts packets without
a route, whatever sends them, including compiled libraries. A command must succeed with neither; `serve` may be called
on the loopback, and the download of b0's weights must be detected, which shows that the monitors work. The namespace is
made by `unshare --net`; on machines that do not allow it, only the hook watches.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from verdict import Drill, Scale, begin

PHOTOS = Path(__file__).parents[1] / "src" / "effnet" / "data" / "photos"
EFFNET = (sys.executable, "-m", "effnet")
NAMESPACE = ("unshare", "--net", "--map-root-user")
NETWORK = """
name: small
resolution: 32
stem: 8
head: 16
num_classes: 3
stages:
- {op: mbconv, channels: 8, repeats: 1, kernel: 3, stride: 1, expansion: 1}
- {op: mbconv, channels: 8, repeats: 1, kernel: 3, stride: 2, expansion: 4}
"""
# The commands, ordered so that each finds the files that it needs from earlier ones.
COMMANDS = (
    "predict PHOTOS --model b0",  # not installed, so it must be downloaded: the only command that may try
    "info b0",
    "scale --macs 300M",
    "predict PHOTOS",
    "explain PHOTOS --out explained",
    "check DATA",
    "pack DATA packed",
    "serve lite0 --port PORT",
    "train DATA --model small.yaml --epochs 1 --resolution 32 --workers 1 --out run",
    "val run/best DATA",
    "convert lite0 --to timm-tf --out lite0-timm",
    "export run/best --format openvino --out small-openvino",
    "export run/best --format onnx --out small.onnx",
    "export run/best --format torch --out small.pt2",
    "predict PHOTOS --model small-openvino",
    "predict PHOTOS --model small.onnx",
    "predict PHOTOS --model small.pt2",
    "predict PHOTOS --model run/best --out answers",
    "profile small.yaml",
    "bench run/best --keep",
    "search DATA --from small.yaml --step 0.1 --rungs 1 --seeds 1 --finalists 1 --epochs 1 --trials 2 --out found",
    "fit DATA --macs 20M --minutes 0.5 --out fitted",
    "export run/best DATA --precision int8 --max-drop 99 --out small-int8",
)
WRITTEN = {words.split("--out ")[1]: number for number, words in enumerate(COMMANDS) if "--out" in words}
SHORT = 8  # the commands that need no torch
HOOK = """
import os, sys

FILE = os.environ["NETWORK_DRILL"]
HOSTS = ("socket.getaddrinfo", "socket.gethostbyname")
ADDRESSES = ("socket.bind", "socket.connect", "socket.sendto")

def watch(event, values):
    if event in HOSTS or (event in ADDRESSES and not isinstance(values[1], (str, bytes))):  # text: a socket in a folder
        place = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(place, f"{event} {values[event in ADDRESSES]}\\n".encode())
        os.close(place)

sys.addaudithook(watch)
"""
LOOPBACK = re.compile(r"socket\.\w+ (\('127\.0\.0\.1', \d+\)|127\.0\.0\.1|localhost|None)")
SECONDS = 600


def prepare(room: Path) -> None:
    """Write what the commands need: three classes of small pictures, a network, and the hook."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for place, name in enumerate(("red", "green", "blue")):
        (room / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., place] += 120
            Image.fromarray(pixels).save(room / "data" / name / f"{number}.png")
    (room / "small.yaml").write_text(NETWORK)
    (room / "hook").mkdir()
    (room / "hook" / "sitecustomize.py").write_text(HOOK)


def run(words: list[str], room: Path) -> dict[str, object]:
    """Run a command in this process's network; return its exit code, its output, and its attempts."""
    watched = room / "watched.txt"
    watched.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (str(room / "hook"), os.environ.get("PYTHONPATH"))))
    given = {"PYTHONPATH": path, "NETWORK_DRILL": str(watched), "EFFNET_CACHE": str(room / "cache")}
    before = unrouted()
    process = subprocess.Popen(
        [*EFFNET, *words],
        cwd=room,
        env={**os.environ, **given, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    if words[0] == "serve":
        assert process.stdout is not None
        said = ask_server(int(words[-1]), process)
    rest, _ = process.communicate(timeout=SECONDS)
    attempts = watched.read_text().splitlines() if watched.exists() else []
    return {"code": process.returncode, "said": said + rest, "attempts": attempts, "unrouted": unrouted() - before}


def ask_server(port: int, process: subprocess.Popen[str]) -> str:
    """Wait for a server, send it a photo, and end it; return its output and its answer."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f":{port}" in line:
            break
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", (PHOTOS / "coffee.png").read_bytes())
    opener, end = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + SECONDS
    while True:
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                lines.append(answer.read().decode())
            break
        except urllib.error.HTTPError as error:  # still loading its model
            if error.code != 503 or time.monotonic() > end:
                raise
            time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    return "".join(lines)


def unrouted() -> int:
    """Packets and connections without a route in this network so far."""
    ip = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    ip6 = [line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines()]
    return int(ip[1][ip[0].index("OutNoRoutes")]) + sum(int(row[1]) for row in ip6 if row[0] == "Ip6OutNoRoutes")


def inside() -> None:
    """The part of a try that runs in its own network, which has only a loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    print(json.dumps(run(sys.argv[3:], Path(sys.argv[2]))))


def words_of(number: int, room: Path) -> list[str]:
    """The words of a command, with paths filled in."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        places = {"PHOTOS": str(PHOTOS), "DATA": str(room / "data"), "PORT": str(free.getsockname()[1])}
    return [places.get(word, word) for word in COMMANDS[number].split()]


def attempt(drill: Drill, number: int, room: Path, isolated: bool) -> None:
    """Do one try, after the earlier commands that it needs."""
    for word in COMMANDS[number].split():
        made = word.partition("/")[0]
        if (needed := WRITTEN.get(made, number)) != number and not (room / made).exists():
            attempt(drill, needed, room, isolated)
    words = words_of(number, room)
    if isolated:
        command = [*NAMESPACE, sys.executable, __file__, "--inside", str(room), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * SECONDS)
        if done.returncode:
            return drill.fault(number, f"{COMMANDS[number]}: {done.stderr.strip()}")
        found = json.loads(done.stdout.splitlines()[-1])
    else:
        found = run(words, room)
    drill.done += 1
    judge(drill, number, found, isolated)
    return None


def judge(drill: Drill, number: int, found: dict[str, object], isolated: bool) -> None:
    """Check that a command ended as it should and made no other connection than allowed."""
    command, said = COMMANDS[number], str(found["said"])
    attempts = list(found["attempts"])
    outside = [each for each in attempts if not (command.startswith("serve") and LOOPBACK.fullmatch(each))]
    drill.counts["sockets of serve"] = drill.counts.get("sockets of serve", 0) + len(attempts) - len(outside)
    if number == 0:
        if found["code"] != 2 or "b0" not in said or "Traceback" in said:
            drill.fault(number, f"{command} ended with {found['code']}: {said[-500:]}")
        if not outside or (isolated and not found["unrouted"]):
            drill.fault(number, f"{command} tried to download and was not seen: {found}")
        return
    if found["code"] != 0:
        drill.fault(number, f"{command} ended with {found['code']}: {said[-500:]}")
    if outside or found["unrouted"]:
        drill.fault(number, f"{command} left the machine: {outside[:3]}, {found['unrouted']} without a route")


def main() -> int:
    """Run the drill and return its exit code."""
    drill = begin("network", Scale(len(COMMANDS), 30, SHORT), __doc__ or "")
    isolated = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number in drill.numbers():
            if number < len(COMMANDS) and not drill.over:
                attempt(drill, number, Path(folder), isolated)
    drill.count("network of its own" if isolated else "hook only")
    return drill.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside()
    else:
        sys.exit(main())

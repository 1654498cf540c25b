"""Load: a server at three times its capacity, with all kinds of bad clients, while its bundle is replaced.

Each try is one client. Most send a photo whose answer is known; the others send slowly, disconnect before the answer,
send half a request and stall, send too much, send something that is not HTTP, or never read the answers. Now and then
the bundle is replaced by another, or by half of one, and the server is told to load it. At the end it gets SIGTERM
under full load. Every complete request must have got exactly one answer, a right one or a refusal that says when to
retry; the server's memory, descriptors and threads must not have grown; its exit code must be 0.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from attacks.clients import KINDS, Site, best_of, exchange
from PIL import Image
from verdict import Drill, Scale, begin

import effnet
from effnet.arch.spec import InputSpec

TIMES = 3  # load relative to the capacity
SIDE, CLASSES = 224, 10
GRACE = 2.0  # seconds after SIGTERM in which the server still answers
PATIENCE = 300.0  # seconds until an answer counts as lost; the server gives up a body after 60, silence after 75
SWAP = 7.0  # seconds between replacements of the bundle
GROWN = 48 * 2**20  # bytes by which its memory may grow: allowed for the allocator; a leak would exceed it in an hour
FULL, SHORT = 10_000_000, 600


def main() -> int:
    """Run the drill."""
    drill = begin("load", Scale(FULL, 60, SHORT, 0.15), __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="effnet-load-") as name:
        asyncio.run(attack(drill, Path(name)))
    return drill.finish()


async def attack(drill: Drill, folder: Path) -> None:
    """Start the server, put it under load, and end it."""
    site = prepare(drill, folder)
    try:
        await wait_for(site, "Next:")
        site.port = int(re.findall(r"Serving at http://[^:]+:(\d+);", "".join(site.log))[0])
        site.rate = float(re.findall(r"about (\d+) images a second", "".join(site.log))[0])
        drill.start = time.monotonic()  # preparation does not count
        around = [asyncio.create_task(watch(site)), asyncio.create_task(replace_bundles(site))]
        clients = await offer(site)
        if drill.only is None:
            await settle(site, clients)
            clients = await offer(site, seconds=1.0)  # then SIGTERM, while they ask
        await end(site, clients)
        for task in around:
            task.cancel()
        judge(site)
    finally:
        site.process.kill()
        site.process.wait()


def prepare(drill: Drill, folder: Path) -> Site:
    """Make two bundles of equal shape, photos with the answers of each bundle, and a server with the first bundle."""
    photos = {f"photo{index}": photo(index) for index in range(12)}
    known = {}
    for index, name in enumerate(("first", "second")):
        torch.manual_seed(index)
        network = effnet.EfficientNet(effnet.spec("b0", resolution=SIDE, num_classes=CLASSES))
        with torch.no_grad():
            network.classifier.weight.mul_(400.0)  # untrained, it would answer all photos alike
        effnet.save(network, folder / name, classes=[f"class{n}" for n in range(CLASSES)], input=InputSpec(SIDE, SIDE))
        files = [io.BytesIO(content) for content in photos.values()]
        with effnet.load(folder / name) as model:
            found = [model.predict(file).to_dict() for file in files]
        known[name] = {photo: best_of(each) for photo, each in zip(photos, found, strict=True)}
    shutil.copytree(folder / "first", folder / "served")
    words = ["serve", f"net={folder / 'served'}", "--port", "0", "--max-upload", "1MB", "--grace", f"{GRACE}s"]
    process = subprocess.Popen(
        [sys.executable, "-m", "effnet", *words, "--threads", "1", "--latency", "300ms"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Site(drill, process, folder, photos, known)


def photo(index: int) -> bytes:
    """A JPEG of coloured noise, different for each index."""
    random = np.random.default_rng(index)
    tiles = random.integers(0, 256, (3 + index, 4 + index, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize((320, 240)).save(buffer, "JPEG")
    return buffer.getvalue()


async def wait_for(site: Site, words: str) -> None:
    """Read the server's output until it contains `words`, and keep reading in the background."""

    def read() -> None:
        for line in site.process.stdout or ():
            site.log.append(line)

    asyncio.get_running_loop().run_in_executor(None, read)
    while words not in "".join(site.log):
        if site.process.poll() is not None:
            raise SystemExit("load: the server did not start:\n" + "".join(site.log))
        await asyncio.sleep(0.1)


async def offer(site: Site, seconds: float | None = None) -> set[asyncio.Task[None]]:
    """Start clients at three times the server's capacity; return those that have not finished."""
    drill, loop = site.drill, asyncio.get_running_loop()
    numbers, clients, random = iter(drill.numbers()), set[asyncio.Task[None]](), drill.draws(-1)
    due = start = loop.time()
    for number in numbers if seconds is None else iter(lambda: drill.done, -1):
        if drill.over or (seconds is not None and loop.time() - start > seconds):
            break
        task = asyncio.create_task(client(site, number))
        clients.add(task)
        task.add_done_callback(clients.discard)
        drill.done += 1
        due += random.expovariate(TIMES * site.rate)
        await asyncio.sleep(max(0.0, due - loop.time()))
        due = max(due, loop.time() - 1.0)  # no catching up if this machine was too slow
    return clients


async def client(site: Site, number: int) -> None:
    """Run one client of a random kind."""
    random = site.drill.draws(number)
    (kind,) = random.choices([*KINDS], [weight for weight, _ in KINDS.values()])
    began = time.monotonic()
    try:
        outcome = await asyncio.wait_for(KINDS[kind][1](site, random), PATIENCE)
    except TimeoutError:
        outcome = "LOST: no answer"
    except (OSError, EOFError) as error:
        outcome = f"LOST: {type(error).__name__} {error}"
    if outcome.startswith("LOST") and time.monotonic() > site.ending and began > site.ending - 1:
        outcome = "came too late"  # after the server was told to end
    site.seen[f"{kind}: {outcome}"] += 1
    if outcome.isupper() or outcome.startswith(("LOST", "WRONG")):
        site.drill.fault(number, f"{kind}: {outcome}")
    else:
        site.drill.count(outcome)


# Around the clients


async def replace_bundles(site: Site) -> None:
    """Now and then replace the bundle by another, or by half of one, and tell the server."""
    random, served = site.drill.draws(-2), site.folder / "served"
    for number in range(1_000_000):
        await asyncio.sleep(SWAP if site.drill.minutes > 1 else 2.0)
        new, old = site.folder / f"new{number}", site.folder / f"old{number}"
        shutil.copytree(site.folder / ("first", "second")[number % 2], new)
        if random.random() < 0.25:
            weights = new / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: random.randrange(1, weights.stat().st_size)])
        served.replace(old)
        new.replace(served)
        shutil.rmtree(old)
        site.process.send_signal(signal.SIGHUP)


async def watch(site: Site) -> None:
    """Record the server's memory, descriptors and threads every second, and its capacity if that has increased."""
    folder, answered = Path(f"/proc/{site.process.pid}"), deque([0], 10)
    while True:
        answered.append(site.drill.counts.get("answered", 0))
        site.rate = max(site.rate, (answered[-1] - answered[0]) / 10)
        try:
            pages = int((folder / "statm").read_text().split()[1])
            here = len([*(folder / "fd").iterdir()]), len([*(folder / "task").iterdir()])
        except OSError:
            return
        site.memory.append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE"), *here))
        await asyncio.sleep(1.0)


async def settle(site: Site, clients: set[asyncio.Task[None]]) -> None:
    """Wait for the last answers, then check that no place is taken and each image was answered exactly once."""
    await asyncio.gather(*clients)
    for _ in range(50):
        _, text = await exchange(site, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        taken = re.findall(rb'^effnet_places_taken{model="net"} (\S+)', text, re.MULTILINE)
        if float(taken[0]) == 0:
            break
        await asyncio.sleep(0.2)
    else:
        site.drill.fault(-1, f"{taken[0].decode()} places are still taken, and nobody waits")
    statuses = re.findall(rb'^effnet_requests_total{endpoint="(\w+)",status="(\d+)"} (\S+)', text, re.MULTILINE)
    given = sum(float(count) for _, status, count in statuses if status == b"200")
    asked = site.drill.counts.get("answered", 0)
    gone = site.drill.counts.get("left before an answer", 0)
    if not asked <= given <= asked + gone:
        site.drill.fault(-1, f"it counts {given:.0f} answers, and {asked} came; {gone} clients had left")
    if broken := sum(float(count) for _, status, count in statuses if status == b"500"):
        site.drill.fault(-1, f"it answered {broken:.0f} times with 500")


async def end(site: Site, clients: set[asyncio.Task[None]]) -> None:
    """Send SIGTERM under load; earlier requests must be answered."""
    site.ending = time.monotonic()
    site.process.send_signal(signal.SIGTERM)
    if site.drill.only is None:
        clients |= await offer(site, seconds=GRACE)
    await asyncio.gather(*clients)
    try:
        code = await asyncio.to_thread(site.process.wait, PATIENCE)
    except subprocess.TimeoutExpired:
        site.drill.fault(-1, f"it runs {PATIENCE:.0f} s after SIGTERM")
        return
    if code:
        site.drill.fault(-1, f"its exit code after SIGTERM is {code}")


def judge(site: Site) -> None:
    """Check the server's output and its growth."""
    said = "".join(site.log)
    for line in site.log:
        known = ("net", "Opening", "Serving", "Next:")
        if not line.startswith(known):
            site.drill.fault(-1, f"it says: {line.strip()}")
            break
    site.drill.counts["bundles replaced"] = said.count("was reloaded")
    site.drill.counts["damaged bundles refused"] = said.count("was not reloaded")
    whole = [each for each in site.memory if each[0] <= site.ending]
    quarter = len(whole) // 4
    if quarter < 10:  # seconds: too short to say
        return
    for place, name, allowed in ((1, "bytes of memory", GROWN), (2, "descriptors", 50), (3, "threads", 10)):
        early, late = (
            statistics.median(row[place] for row in rows) for rows in (whole[quarter : 2 * quarter], whole[-quarter:])
        )
        most = max(row[place] for row in whole)
        print(f"load: {name}: {early:,.0f} in the second quarter, {late:,.0f} in the last, {most:,} at most")
        if late > early + allowed:
            site.drill.fault(-1, f"it grew from {early:,.0f} to {late:,.0f} {name}")
    for key, value in sorted(site.seen.items()):
        print(f"load: {value:9,} {key}")


if __name__ == "__main__":
    sys.exit(main())

"""Kills: commands get kill -9 at random moments, are resumed, and must give the results of undisturbed ones.

Each try draws a kind of command, runs it in a new folder and kills it once or several times. Half of the kills come
after a random time, half just before a random file operation: opening for writing, renaming, removing or creating.
After each kill, every file in the folder must be whole, and files that were whole before must still exist. Then the
command is resumed as a user would, with --resume or by repeating it, and in the end its output must equal that of an
undisturbed command, bit for bit except for times, with no other files left behind.

Most commands are forks of a process that has imported torch, a few are new processes; see killing/processes.py. The
workers of a forked search are also forks, whereas a user's are new processes. kill -9 ends a process, not the machine:
power failures are not tested.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verdict import Drill, Scale, begin

# One thread each; set before importing anything that starts threads
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ |= {"PYTHONWARNINGS": "ignore", "NNCF_CI": "1"}

from killing.kinds import KINDS, Kind, find_difference, make_shared, read_result
from killing.processes import NEVER, Aim, Running, fork, fork_search_workers, in_child, start
from killing.serving import attack_server, free_port
from killing.whole import find_damage, list_leftovers

from effnet.data.dataset import read_data
from effnet.errors import DataError

SERVE, SERVE_WEIGHT = "serve", 6
REAL = 0.04  # share of tries that start commands in new processes, as a user does
ALONE = 0.3  # share of kills that end only one process of a command with several
IMPORTED = (  # what commands import, imported once here; not onnxruntime and openvino, which start threads
    "effnet.training.train",
    "effnet.fitting.fit",
    "effnet.searching.search",
    "effnet.packing.command",
    "effnet.predicting.parts",
    "effnet.exporting.repository",
    "effnet.exporting.int8",
    "effnet.converting",
    "effnet.serving.app",
    "effnet.serving.server",
    "effnet.weights.writers",
    "effnet.weights.verify",
    "effnet.runtime.native",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "uvicorn.protocols.http.auto",
    "torch.distributed",
)


@dataclass(frozen=True)
class Oracle:
    """Result and duration of an undisturbed command."""

    result: dict[str, Any]
    seconds: float
    changes: int


@dataclass
class Attack:
    """The kills, their folder, and the oracles computed so far."""

    drill: Drill
    work: Path
    oracles: dict[str, Oracle] = field(default_factory=dict)
    running: Running | None = None

    @property
    def shared(self) -> Path:
        """The folder of inputs shared by all commands."""
        return self.work / "shared"

    @property
    def place(self) -> Path:
        """The folder in which every command runs: always the same one, since results contain its name."""
        return self.work / "place"

    def attempt(self, number: int) -> None:
        """Do one try."""
        draws = self.drill.draws(number)
        name = draw_kind(draws)
        real = draws.random() < REAL
        self.drill.count(f"{'started' if real else 'forked'} tries")
        title = f"{name}{' (started)' if real else ''}"
        try:
            for fault in self._serve(draws, real) if name == SERVE else self._kill(draws, name, KINDS[name], real):
                self.drill.fault(number, f"{title}: {fault}")
        except (RuntimeError, TimeoutError) as error:
            self.drill.fault(number, f"{title}: {error}")

    def _kill(self, draws: random.Random, name: str, kind: Kind, real: bool) -> Iterator[str]:
        oracle = self._oracle(name, kind)
        self._clear(kind)
        before = {file.name for file in self.place.iterdir()}
        for earlier in range(draws.randint(1, kind.most)):
            aim = draw_aim(draws, oracle, kind, real, first=earlier == 0)
            running = self._start(kind, aim, draws, real)
            code = running.wait()
            if code is not None and (aim.alone is None or code in kind.codes):
                break  # it finished before the kill
            self.drill.count("kills")
            self.drill.count(f"kills of {name}")
            yield from find_damage(self.place)
            if lost := before - {file.name for file in self.place.iterdir()}:
                yield f"{lost} was there before and is gone after {aim}"
            if name.startswith("pack"):
                yield from self._read_pack()
            if kind.once and not find_difference(oracle.result, read_result(self.place)):
                return
        else:
            running = self._start(kind, NEVER, draws, real)
            code = running.wait()
        if code not in kind.codes:
            yield f"exit code {code}: {running.tail()}"
            return
        yield from find_damage(self.place)
        if differs := find_difference(oracle.result, read_result(self.place)):
            yield f"ends differently: {differs}"
        if name.startswith(("train", "fit", "search", "predict", "pack")) and (left := list_leftovers(self.place)):
            yield f"leaves {left}"

    def _serve(self, draws: random.Random, real: bool) -> Iterator[str]:
        self._clear(None)

        def begin_server(words: list[str], aim: Aim) -> Running:
            log, cache = self.work / "log.txt", str(self.place / "cache")
            self.running = (start if real else fork)(words, self.place, log, aim, EFFNET_CACHE=cache)
            return self.running

        for found in attack_server(draws, draws.randint(1, 3), begin_server, self.shared, self.place, slow=real):
            if found is None:
                self.drill.count("kills")
                self.drill.count("kills of serve")
            else:
                yield found

    def _oracle(self, name: str, kind: Kind) -> Oracle:
        if name not in self.oracles:
            self._clear(kind)
            running = self._start(kind, NEVER, random.Random(0), real=False)
            code, seconds = running.wait(), running.seconds
            if code not in kind.codes:
                raise RuntimeError(f"{name}, undisturbed, ends with exit code {code}: {running.tail()}")
            if damage := [*find_damage(self.place), *list_leftovers(self.place)]:
                raise RuntimeError(f"{name}, undisturbed, leaves {damage}")
            self.oracles[name] = Oracle(read_result(self.place), seconds, running.changes)
        return self.oracles[name]

    def _start(self, kind: Kind, aim: Aim, draws: random.Random, real: bool) -> Running:
        environment = {"EFFNET_CACHE": str(self.place / "cache")}
        if kind.processes > 1 and not real:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(draws))}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(kind.processes))
        words = kind.words(self.shared, self.place)
        self.running = (start if real else fork)(
            words, self.place, self.work / "log.txt", aim, kind.processes, **environment
        )
        return self.running

    def _read_pack(self) -> Iterator[str]:
        """Check that a pack can be read whole, or is refused with the command that finishes it."""
        try:
            read = len(read_data(self.place / "out"))
            if read != 60:
                yield f"a killed pack is read as {read} images"
        except DataError as error:
            if "effnet pack" not in str(error) and any((self.place / "out").glob("[!.]*")):
                yield f"a killed pack is refused by: {error}"

    def _clear(self, kind: Kind | None) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        (self.work / "log.txt").write_text("")
        if kind:
            kind.prepare(self.shared, self.place)


def draw_kind(draws: random.Random) -> str:
    """Draw a kind by weight."""
    weights = {**{name: kind.weight for name, kind in KINDS.items()}, SERVE: SERVE_WEIGHT}
    return draws.choices([*weights], [*weights.values()])[0]


def draw_aim(draws: random.Random, oracle: Oracle, kind: Kind, real: bool, first: bool) -> Aim:
    """Draw when to kill; a resumed command has less left to do."""
    share = draws.random() ** (1 if first else 2)
    several = kind.workers or kind.processes > 1
    alone = draws.randrange(kind.processes) if several and draws.random() < ALONE else None
    if real:
        return Aim(seconds=share * (oracle.seconds + 3 * kind.processes), alone=None if kind.processes > 1 else alone)
    if draws.random() < 0.5:
        return Aim(change=1 + int(share * oracle.changes), alone=None if alone is None else 0)
    return Aim(seconds=share * oracle.seconds, alone=alone)


def main() -> int:
    """Run the drill and return its exit code."""
    drill = begin("kills", Scale(tries=400, minutes=90, short_tries=8, short_minutes=10), __doc__ or "")
    work = Path(tempfile.mkdtemp(prefix="effnet-kills-"))
    attack = Attack(drill, work)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that child processes end, too
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, sys.path[1:])))
    try:
        (work / "shared").mkdir()
        if in_child(lambda: make_shared(work / "shared"), work) != 0:
            raise SystemExit("kills: what the commands need cannot be made")
        for module in IMPORTED:
            with suppress(ImportError):
                __import__(module)
        import torch

        torch.set_num_threads(1)
        fork_search_workers()
        gc.freeze()
        numbers = drill.numbers() if drill.only is not None or not drill.short else quick_numbers(drill)
        for number in numbers:
            if drill.over:
                break
            attack.attempt(number)
            drill.done += 1
    finally:
        if attack.running and not attack.running.poll():
            attack.running.kill()
        shutil.rmtree(work, ignore_errors=True)
    return drill.finish()


def quick_numbers(drill: Drill) -> Iterator[int]:
    """The numbers of the first tries with quick kinds."""
    numbers = (n for n in itertools.count() if (k := KINDS.get(draw_kind(drill.draws(n)))) and k.quick)
    return itertools.islice(numbers, drill.tries)


if __name__ == "__main__":
    sys.exit(main())

"""A Ray cluster of two machines, which are processes of this one: either can be killed in the middle of a job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ray.cluster_utils import Cluster

SMALL = {
    "num_cpus": 1,
    "object_store_memory": 80 * 2**20,
    **{"include_dashboard": False, "include_log_monitor": False, "no_monitor": True},  # processes that no test needs
}


class Machines:
    """Two machines with a core each, to the first of which this process connects."""

    def __init__(self) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        self.cluster = Cluster(initialize_head=True, head_node_args=SMALL)
        self.first, self.second = self.cluster.head_node, self.cluster.add_node(**SMALL)
        self.address: str = self.cluster.address
        signal.signal(signal.SIGTERM, handler)  # each machine sets its own, which processes forked later would wait in

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()

    def workers(self, machine: Any, job: str) -> list[int]:
        """The processes of a machine that run a job of that name at this moment."""
        raylet = machine.all_processes["raylet"][0].process.pid
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == raylet and f"ray::{job}".encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    @contextlib.contextmanager
    def second_dies(self, job: str) -> Iterator[None]:
        """Meanwhile the second machine is killed, as soon as both are in the middle of such a job."""
        thread = threading.Thread(target=self._kill_second, args=[job], daemon=True)
        thread.start()
        yield
        thread.join()

    def _kill_second(self, job: str) -> None:
        held = dict[Any, int]()
        while len(held) < 2:
            for machine in {self.first, self.second} - set(held):
                for worker in self.workers(machine, job)[:1]:
                    os.kill(worker, signal.SIGSTOP)
                    if worker in self.workers(machine, job):
                        held[machine] = worker
                    else:  # it had just finished
                        os.kill(worker, signal.SIGCONT)
            time.sleep(0.05)
        self.cluster.remove_node(self.second, allow_graceful=False)
        os.kill(held[self.second], signal.SIGKILL)  # what is held does not notice that its machine is gone
        os.kill(held[self.first], signal.SIGCONT)

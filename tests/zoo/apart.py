"""Names of work in, what became of each out: every item in a process of its own, under a time and a memory limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.zoo.prune", "torch._dynamo", "torch.export"])
"""Processes that nothing has run in yet, whatever their parent has done; what takes long to import they share."""

PAGE = 4096
PAUSE = 0.05

Row = dict[str, Any]
Work = Callable[[str, str], Iterator[Row]]
"""``work(family, name)`` yields what is known after each step; ``stage`` names the step that comes next."""


@dataclass(frozen=True, slots=True)
class Limits:
    """For one item."""

    seconds: float
    bytes: int


@dataclass(slots=True)
class Job:
    """A running item and what it has said so far."""

    process: Any
    pipe: Connection
    began: float
    row: Row

    def listen(self) -> bool:
        """Take in what it says; True once it has said everything."""
        try:
            while self.pipe.poll():
                self.row.update(self.pipe.recv())
        except EOFError:
            return True
        return False

    def breach(self, limits: Limits) -> str | None:
        """The limit it is over, if any."""
        if time.monotonic() - self.began > limits.seconds:
            return f"timeout after {limits.seconds:.0f} s"
        return f"more than {limits.bytes / 2**30:.0f} GiB of memory" if resident(self.process.pid) > limits.bytes else None


def apart(work: Work, items: Sequence[tuple[str, str]], jobs: int, limits: Limits) -> Iterator[Row]:
    """Each item's row as it ends; ``error`` says why where it did not get through."""
    waiting, running = list(items), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(started(work, *waiting.pop(0)))
        for job in list(running):
            if ended(job, limits):
                running.remove(job)
                job.process.join()
                yield finished(job)
        time.sleep(PAUSE)


def started(work: Work, family: str, name: str) -> Job:
    ours, theirs = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=tell, args=(work, family, name, theirs))
    process.start()
    theirs.close()
    return Job(process, ours, time.monotonic(), {"family": family, "type": name, "stage": "build"})


def tell(work: Work, family: str, name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        for found in work(family, name):
            pipe.send(found)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        pipe.send({"error": " ".join(text.split())[:400], "at": traceback.format_exc()[-1500:]})
    pipe.close()


def ended(job: Job, limits: Limits) -> bool:
    if job.listen():
        return True
    why = job.breach(limits)
    if why:
        job.row["error"] = why
        job.process.kill()
    return why is not None


def finished(job: Job) -> Row:
    if job.row["stage"] != "done" and "error" not in job.row:
        job.row["error"] = f"the process ended with code {job.process.exitcode}"
    return job.row | {"seconds": round(time.monotonic() - job.began, 1)}


def resident(pid: int) -> int:
    """Bytes of memory a process holds; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0

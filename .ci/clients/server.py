"""A server of ours that a script starts, restarts and stops itself; and checks that speak."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any

PATIENCE = 15                   # seconds for the server to start, or to stop


def check(what: str, holds: object, shown: object = None) -> None:
    """Print what has been found to hold; end the script if it does not."""
    if not holds:
        raise AssertionError(what if shown is None else f"{what}; it was {shown!r}")
    print(f"  ok  {what}", flush=True)


def skip(what: str, reason: str) -> None:
    """Print what this client cannot do by itself, and why."""
    print(f"skip  {what}: {reason}", flush=True)


class Server:
    """A server of the module, run by the python, with flags of its command line; a context manager."""

    def __init__(self, python: str, module: str, *flags: str) -> None:
        self.command = [python, module, *flags]
        self.port = 0           # any free one; once started, always the same
        self.log = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cometd"

    def start(self) -> None:
        self.process = subprocess.Popen([*self.command, "--port", str(self.port)], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        for line in self.process.stdout:
            found = re.search(r" open http://127\.0\.0\.1:(\d+)/", line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise AssertionError(f"the server did not start: status {self.process.wait(PATIENCE)}")
        self.reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self.reader.start()

    def _read(self, output: Iterable[str]) -> None:
        for line in output:
            self.log += line

    def stop(self) -> None:
        """Stop it as a service manager does; it must end with status 0, and have logged no error."""
        self.process.terminate()
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        if status or re.search(r"Traceback| (ERROR|CRITICAL) ", self.log):
            raise AssertionError(f"the server ended with status {status}, or logged errors:\n{self.log}")

    def restart(self) -> None:
        self.stop()
        self.start()
        print("  --  the server was stopped, and started again", flush=True)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.process.kill()         # in vain, if all was well


def run(name: str, seconds: int, work: Callable[[], None]) -> None:
    """Run a script's work: exit status 1 if it fails, or takes longer than seconds."""
    def give_up(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    status = 1
    try:
        work()
        print(f"{name}: all well")
        status = 0
    finally:
        if status:
            traceback.print_exc(file=sys.stdout)
            print(f"{name} FAILED")
        sys.stdout.flush()
        os._exit(status)        # what still waits for the server must not keep us

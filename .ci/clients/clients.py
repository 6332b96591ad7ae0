#!/usr/bin/env python3
"""Every stock client over each of its transports against a server of ours.

    python clients.py [--python PYTHON] [--only TEXT] bayeux_server.py

It makes a temporary folder with the clients (npm install, and a virtual environment for each of
PyPI's; versions are pinned in package.json and pypi_*.txt), runs one script a client and transport, each
with a server of its own on a free port of 127.0.0.1, prints what they found and at the end a table, and
exits with 1 if any failed.  It needs node, npm, chromium (CHROMIUM names it, if it is elsewhere) and a CPython
from 3.11 to 3.13.
"""

import argparse
import concurrent.futures
import glob
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
AT_ONCE = 2                     # scripts side by side: they mostly wait, but browsers start slowly
SCRIPT_TIME = 150               # seconds for one script; each gives up by itself before
INSTALL_TIME = 240              # seconds for one installation
OLDEST, NEWEST = (3, 11), (3, 13)       # the CPythons on which PyPI's clients are known to work

# script, what stands before its transport, the client as it is called in the table, its transports
CLIENTS = [
    ("npm_cometd.js", [], "npm cometd 9.0.0", ["long-polling", "callback-polling", "websocket"]),
    ("npm_faye.js", [], "npm faye 1.4.3, Node", ["long-polling", "websocket"]),
    ("npm_browser.js", ["faye"], "npm faye 1.4.3, Chromium",
     ["websocket", "eventsource", "long-polling", "cross-origin-long-polling", "callback-polling"]),
    ("npm_browser.js", ["dojox"], "npm dojox 1.7.12, Chromium", ["json", "form", "json-comment-filtered", "jsonp"]),
    ("pypi_aiocometd.py", [], "PyPI aiocometd-ng 0.5.6", ["long-polling", "websocket"]),
    ("pypi_baiocas.py", [], "PyPI baiocas 2.0.0", ["long-polling"]),
    ("pypi_python_bayeux.py", [], "PyPI python-bayeux 1.0.0", ["long-polling"]),
    ("pypi_pyfaye.py", [], "PyPI pyfaye 0.1.0", ["long-polling", "websocket"]),
]

printing = threading.Lock()


def newest_python() -> str:
    """The newest CPython of this machine on which the clients are known to work: of PATH and of pyenv."""
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = ["python3", *(f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)),
                  *glob.glob(os.path.join(root, "versions", "*", "bin", "python"))]
    ask = ("import sys, sysconfig, venv, ensurepip; print(*sys.version_info[:3], sys.implementation.name, "
           "sysconfig.get_config_var('Py_GIL_DISABLED') or 0, sys.executable)")
    found = []
    for candidate in candidates:
        try:
            answer = subprocess.run([candidate, "-c", ask], check=False, capture_output=True, text=True, timeout=30)
        except OSError:
            continue
        match = re.match(r"(\d+) (\d+) (\d+) cpython 0 (.+)", answer.stdout)
        if match:
            version = tuple(map(int, match.groups()[:3]))
            if OLDEST <= version[:2] <= NEWEST:
                found.append((version, match[4]))
    if not found:
        sys.exit("clients.py: PyPI's clients need a CPython from {}.{} to {}.{}, with venv".format(*OLDEST, *NEWEST))
    return max(found)[1]


def run(command: list, folder: pathlib.Path, seconds: float) -> tuple:
    """Run a command in a process group of its own, which is ended whole.  Its status and its output."""
    process = subprocess.Popen([str(word) for word in command], cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"(it was ended after {seconds} s)\n"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, output


def install(command: list, folder: pathlib.Path) -> None:
    """Run what needs the network; once more, if it fails."""
    for _ in range(2):
        status, output = run(command, folder, INSTALL_TIME)
        if status == 0:
            return
        time.sleep(2)
    sys.exit(f"clients.py: {' '.join(map(str, command))} failed:\n{output}")


def prepare(folder: pathlib.Path, scripts: set) -> dict:
    """Install what the scripts need.  How to run each of them."""
    for path in HERE.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    runners, steps = {}, []
    if any(script.endswith(".js") for script in scripts):
        steps.append([["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]])
    python = newest_python() if any(script.endswith(".py") for script in scripts) else None
    for script in scripts:
        if script.endswith(".js"):
            runners[script] = ["node", script]
        else:
            environment = folder / "environments" / script[:-3]
            runners[script] = [environment / "bin" / "python", "-u", script]
            steps.append([[python, "-m", "venv", environment],
                          [environment / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
                           "-r", folder / f"{script[:-3]}.txt"]])
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda step: [install(command, folder) for command in step], steps))
    print(f"PyPI's clients run on {python}" if python else "no client of PyPI's is asked for", flush=True)
    return runners


def try_one(job: tuple) -> tuple:
    """Run one script over one transport, and print what it found.  A row of the table."""
    client, transport, command, folder = job
    began = time.monotonic()
    status, output = run(command, folder, SCRIPT_TIME)
    seconds = time.monotonic() - began
    with printing:
        print(f"\n# {client}, {transport}\n{output.rstrip()}", flush=True)
    found = "FAILED" if status else "passed"
    skipped = len(re.findall(r"^skip  ", output, re.MULTILINE))
    return client, transport, found + f", {skipped} step skipped" * bool(skipped), f"{seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("module", type=os.path.abspath, help="bayeux_server.py")
    parser.add_argument("--python", default=sys.executable, help="what runs the server (this Python)")
    parser.add_argument("--only", default="", help="only clients and transports in whose row of the table this stands")
    options = parser.parse_args()
    wanted = [(script, before, client, transport) for script, before, client, transports in CLIENTS
              for transport in transports if options.only in f"{client} {transport}"]
    if not wanted:
        parser.error(f"no client or transport is called {options.only!r}")
    with tempfile.TemporaryDirectory(prefix="clients-") as name:
        folder = pathlib.Path(name)
        runners = prepare(folder, {script for script, *_ in wanted})
        jobs = [(client, transport, [*runners[script], *before, transport, options.python, options.module], folder)
                for script, before, client, transport in wanted]
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(try_one, jobs))
    print()
    table = [("client", "transport", "result", "time"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    failed = sum(row[2].startswith("FAILED") for row in rows)
    print(f"clients: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""One process imports the host, and every process of many runs is a copy of it.

    .venv/bin/python benchmarks/prefork.py bond bench recipes/miniature/bench-pooled.yaml --output-dir runs/bench

runs the command with such a process beside it, and ends with the command's exit status.

A run of the host is five to eight Python processes, each of which imports torch, DeepSpeed, vLLM and the host: about
ten seconds of one core a process, which is nothing beside a training on a cluster, and most of a training of a
small model. :class:`Server` starts a process that imports them once, without starting a thread, and then forks:
``server.python`` is an executable that takes Python's own command line (``[-u] [-m module | -c code | file] …``) and
hands it, with its environment, folder and open files, to that process, whose fork runs it. The package starts its
processes by the executable that BOND_PREFORK_PYTHON names, Ray's workers too, and a copy's children of
multiprocessing are started by it here.

The executable waits for its copy and ends with its exit status; if it is killed, so is the copy. Only for machines
without GPU: what CUDA's libraries do at import is not known to survive a fork.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bond_plugin.host import DEVICE_VARIABLE, PYTHON_VARIABLE, launch, load_plugins

#: What a run imports. Their imports bring the rest.
_MODULES = (
    "openrlhf.cli.train_ppo_ray",
    "openrlhf.trainer.ppo_trainer",
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ray.vllm_engine",
    "ray._private.workers.default_worker",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "transformers.models.llama.modeling_llama",
    "torch.utils.tensorboard",
)
#: Libraries that would start threads when they are imported.
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1"}
#: Ray reads a worker's job from the environment when it is imported, so all workers of all runs are of this job: the
#: first of a cluster. Each run here starts a cluster of its own. Workers of other jobs are not copies.
_JOB = "01000000"
#: Threads that look after themselves in a fork: jemalloc's (in pyarrow) stops before one and starts after it.
_HARMLESS = ("jemalloc",)
_HIGH = 512  # where received files wait for their own number
_START_SECONDS = 300
_COPIES = "copies"  # folder of files named for executables that run, each with its copy's process id; for bond bench
_SERVE = "--serve"  # this file's argument in the process that imports

# Runs before anything else is imported: every process of a run pays for it.
_CLIENT = """\
import array, json, os, signal, socket, sys
here = socket.socket(socket.AF_UNIX)
here.connect({socket!r})
files = [int(name) for name in os.listdir("/proc/self/fd")]
files = [f for f in files if f != here.fileno() and os.path.exists(f"/proc/self/fd/{{f}}")]
request = json.dumps(dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), files=files,
                          umask=os.umask(0), nice=os.nice(0))).encode()
here.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
here.sendall(request)
pid = int.from_bytes(here.recv(8), "big")
with open(os.path.join({copies!r}, str(os.getpid())), "w") as file:
    file.write(str(pid))
def hand_on(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, hand_on)
status = here.recv(8)
if not status:
    sys.exit("the process that holds the imports is gone")
status = int.from_bytes(status, "big", signed=True)
if status < 0:
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class PreforkError(RuntimeError):
    """The process that holds the imports did not start. The message ends with what it said."""


class Server:
    """A process with the host's imports in it, from now until :meth:`close`.

    Attributes:
        python: the executable that runs a Python command line in a copy of it.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it has imported everything, about half a minute.

        Args:
            variables: its environment; this process's if not given. Settings that libraries read when they are
                imported are those of all copies.

        Raises:
            PreforkError: it did not start.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="bond-prefork-")
        folder = Path(self._folder.name)
        address, self._log = folder / "socket", folder / "log"
        client = folder / "client.py"
        (folder / _COPIES).mkdir()
        client.write_text(_CLIENT.format(socket=str(address), copies=str(folder / _COPIES)))
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {client} "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)
        variables = (
            dict(os.environ if variables is None else variables)
            | _NO_THREADS
            | {"RAY_JOB_ID": _JOB, PYTHON_VARIABLE: str(self.python)}
        )
        with self._log.open("w") as log:
            # Its standard input is our end of a pipe: it ends when we do, however we end.
            self._process = subprocess.Popen(
                [sys.executable, __file__, _SERVE, str(address)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=variables,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not address.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text(errors="replace")
                self.close()
                raise PreforkError(f"the process that imports the host for all runs did not start:\n{said[-2000:]}")
            time.sleep(0.05)

    def close(self) -> None:
        """End it, and with it every copy that still runs."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


# The server's side.


def _serve(address: str) -> None:
    import importlib

    sys.path.pop(0)  # this file's folder, which is of no use to copies
    # Read at import as the job is: the process by whose end workers know that Ray's daemon has gone. Theirs ends
    # their connection to it too, which they notice as well.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    load_plugins()
    for name in _MODULES:
        importlib.import_module(name)
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    others = [name for name in threads if not name.startswith(_HARMLESS)]
    if len(others) > 1 or threading.active_count() > 1:
        raise SystemExit(f"an import started threads, which a fork would lose: {', '.join(others)}")
    import gc

    gc.collect()
    gc.freeze()  # pages that the collector never writes to stay shared

    waiting: dict[int, socket.socket] = {}  # copies that run, by process id
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "new")
    selector.register(wake, selectors.EVENT_READ, "ended")
    selector.register(0, selectors.EVENT_READ, "over")
    os.rename(address + ".new", address)
    try:
        while True:
            for key, _ in selector.select():
                if key.data == "new":
                    connection, _ = listener.accept()
                    request, files = _receive(connection)
                    if request is None:
                        connection.close()
                        continue
                    pid = os.fork()
                    if pid == 0:
                        keep = [listener, connection, *waiting.values()]
                        _become(request, files, keep, selector, (wake, woken))
                    for number in files:
                        os.close(number)
                    waiting[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    with contextlib.suppress(OSError):
                        connection.sendall(pid.to_bytes(8, "big"))
                elif key.data == "ended":
                    os.read(wake, 4096)
                    _reap(waiting, selector)
                elif key.data == "over":
                    return
                elif not key.fileobj.recv(1):  # its executable was killed
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)
    finally:
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _reap(waiting: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection = waiting.pop(pid)
        with contextlib.suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        with contextlib.suppress(KeyError):
            selector.unregister(connection)
        connection.close()


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    head, control, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 250))
    files = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    wanted, body = int.from_bytes(head, "big"), b""
    while len(body) < wanted:
        part = connection.recv(wanted - len(body))
        if not part:
            return None, list(files)
        body += part
    return (json.loads(body), list(files)) if body else (None, list(files))


def _become(request: dict, files: list[int], sockets: list, selector: Any, pipe: tuple[int, int]) -> None:
    """In the fork: be the process that was asked for. Does not return."""
    import fcntl

    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        selector.close()
        for one in sockets:
            one.close()
        for number in pipe:
            os.close(number)
        high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _HIGH) for number in files]
        for number in files:
            os.close(number)
        for number, wanted in zip(high, request["files"], strict=True):
            os.dup2(number, wanted)
            os.close(number)
        os.chdir(request["cwd"])
        os.umask(request["umask"])
        with contextlib.suppress(OSError):
            os.nice(request["nice"] - os.nice(0))
        os.environ.clear()
        os.environ.update(request["env"])
        if os.environ.get("RAY_JOB_ID", _JOB) != _JOB:
            os.execv(sys.executable, [sys.executable, *request["argv"]])
        status = _run(request["argv"])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> None:
    """What an interpreter does when it ends, but for tearing down what it shares with the others."""
    import atexit

    with contextlib.suppress(BaseException):
        threading._shutdown()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(status)


def _run(argv: list[str]) -> int:
    """Python's command line, as far as Ray, multiprocessing and we use it."""
    import multiprocessing.spawn
    import random
    import runpy

    import numpy
    import torch

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that the host is imported already
    random.seed()
    numpy.random.seed()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdigit() else os.cpu_count() or 1)
    if PYTHON_VARIABLE in os.environ:  # spawned children are copies too: vLLM's engine is one
        multiprocessing.spawn.set_executable(os.environ[PYTHON_VARIABLE])
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]  # what is imported already stays
    while argv and argv[0].startswith("-") and argv[0] not in ("-m", "-c"):
        if argv[0] in ("-X", "-W"):  # their value follows
            argv = argv[1:]
        argv = argv[1:]
    kind = argv[0] if argv else "-c"
    if kind == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(argv[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
        main = type(sys)("__main__")
        main.__file__ = argv[0]
        sys.modules["__main__"] = main
        exec(compile(Path(argv[0]).read_bytes(), argv[0], "exec"), vars(main))
    return 0


def main(command: list[str]) -> int:
    """Run ``command`` with a server beside it. Returns its exit status, as a shell says it."""
    if not command:
        raise SystemExit("usage: python benchmarks/prefork.py COMMAND ...")
    import torch

    if torch.cuda.is_available() or "RAY_ADDRESS" in os.environ:
        raise SystemExit("prefork.py: only for runs on this machine, and without a GPU")
    os.environ[DEVICE_VARIABLE] = "cpu"
    launch.settle_device([])
    with Server() as server:
        running = subprocess.Popen(command, env={**os.environ, PYTHON_VARIABLE: str(server.python)})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command too, which ends as it likes
        signal.signal(signal.SIGTERM, lambda number, frame: running.send_signal(number))
        status = running.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if sys.argv[1:2] == [_SERVE]:
        _serve(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))

"""Nothing of a run waits for what has died, and nothing of it stays.

A rank that dies inside a collective (a weight sync, a gathering of parameters) leaves the others waiting for the
collective's time-out, half an hour. And vLLM's engine is a process of its own, which would hold a GPU's memory when
the actor that started it is killed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from typing import Any

_LOOK_EVERY = 5.0  # seconds
_GRACE = 15.0  # seconds in which the main thread can end the run with the cause's traceback
_HEARD = 1.0  # seconds until Ray has heard of a death, of which a collective's peers know at once


def end_with_parent() -> None:
    """If multiprocessing started this process, end it when the process that did so has ended, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name=end_with_parent.__name__, daemon=True).start()


def end_with_actors() -> None:
    """In the launching process, once Ray runs: end the run when one of its actors has died, and name it."""

    over = threading.Event()

    def end() -> None:
        over.set()
        if hasattr(sys, "last_value"):  # an exception ends the run: a broken connection, if a peer saw it first
            time.sleep(_HEARD)
            name(_dead_actors())

    def name(dead: list[dict[str, Any]]) -> None:
        for actor in dead:
            print(f"bond: error: {_died(actor)}", file=sys.stderr)

    atexit.register(end)  # after Ray is imported, so that it comes before Ray ends its actors

    def look() -> None:
        dead: list[dict[str, Any]] = []
        while not dead and not over.wait(_LOOK_EVERY):
            dead = _dead_actors()
        if over.wait(_GRACE):
            return
        name(dead)
        print("bond: error: the run ends; --ckpt.load_enable resumes from its last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=look, name=end_with_actors.__name__, daemon=True).start()


def _dead_actors() -> list[dict[str, Any]]:
    import ray
    from ray._private import state

    if not ray.is_initialized():
        return []
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return list(state.actors(job_id=job, actor_state_name="DEAD").values())


def _died(actor: dict[str, Any]) -> str:
    cause = actor["DeathCause"].actor_died_error_context
    where = actor["Address"]["IPAddress"]
    return f"{actor['ActorClassName']} (process {actor['Pid']} on {where}) has died: {cause.error_message.strip()}"


def end_on_signals() -> None:
    """Ctrl-C and SIGTERM end the run with a line, and status 130 and 143; Ray ends its processes as Python leaves."""

    def stop(number: int, frame: Any) -> None:
        global _status
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        print(f"bond: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        _status = 128 + number
        raise SystemExit(_status)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)


def _leave() -> None:
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


#: With which status a signal ends this process. Ray, inside which the signal arrives, makes 1 of any other than 0.
_status: int | None = None
atexit.register(_leave)  # before Ray is imported, so that it comes after what Ray does at the end

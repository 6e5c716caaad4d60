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
from collections.abc import Callable
from typing import Any, NoReturn

_LOOK_EVERY = 5.0  # seconds
_LOOK_FOR_SAVED = 0.2
_NAMESPACE = b"bond"
_GRACE = 15.0  # seconds in which the main thread can end the run with the cause's traceback
_HEARD = 1.0  # seconds until Ray has heard of a death, of which a collective's peers know at once


def end_with_parent() -> None:
    """If multiprocessing started this process, end it when the process that did so has ended, however that ended.

    And not before: a terminal sends Ctrl-C to every process of its group, and vLLM's engine would obey at once.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return

    os.setpgid(0, 0)

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
            cause, where = actor["DeathCause"].actor_died_error_context, actor["Address"]["IPAddress"]
            who = f"{actor['ActorClassName']} (process {actor['Pid']} on {where})"
            print(f"bond: error: {who} has died: {cause.error_message.strip()}", file=sys.stderr)

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


def end_on_signals(save: bool = False) -> None:
    """Ctrl-C and SIGTERM end the run with a line, and status 130 and 143; Ray ends its processes as Python leaves.

    With ``save`` the first one asks the trainer for a checkpoint, and the run ends when that is whole.
    """

    def stop(number: int, frame: Any) -> None:
        global _status
        signal.signal(number, signal.SIG_DFL)  # one more ends it at once
        print(f"bond: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        _status = 128 + number
        raise SystemExit(_status)

    def ask(number: int, frame: Any) -> None:
        handle(stop)
        print(
            f"bond: {signal.Signals(number).name}: the step that runs is finished and a checkpoint is saved, then "
            "the run ends; a second signal ends it at once",
            file=sys.stderr,
            flush=True,
        )
        # In a thread: the signal may have interrupted Ray itself.
        threading.Thread(target=_end_when_saved, args=(number,), name=ask.__qualname__, daemon=True).start()

    def handle(by: Callable[[int, Any], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, by)

    if save:
        asked_to_stop()  # if Ray's store does not answer, it fails now and not when it is needed
    if threading.current_thread() is threading.main_thread():
        handle(ask if save else stop)


def _end_when_saved(number: int) -> None:
    _tell("stop", "yes")
    while (saved := _told("saved")) is None:
        time.sleep(_LOOK_FOR_SAVED)
    print(f"bond: saved {saved}: --ckpt.load_enable goes on from it", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def asked_to_stop() -> bool:
    """In the trainer's process: whether the launching one was asked to end the run with a checkpoint."""
    return _told("stop") is not None


def stop_at(tag: str) -> NoReturn:
    """In the trainer's process, once this checkpoint is whole: take no other step until the launching one ends us."""
    _tell("saved", tag)
    while True:
        time.sleep(_LOOK_EVERY)


# What processes of a run say to each other while the trainer's is busy, and so takes no call: in Ray's own store.


def _tell(key: str, value: str) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_of_run(key), value.encode(), namespace=_NAMESPACE)


def _told(key: str) -> str | None:
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_of_run(key), namespace=_NAMESPACE)
    return None if found is None else found.decode()


def _of_run(key: str) -> bytes:
    import ray

    return f"{ray.get_runtime_context().get_job_id()}/{key}".encode()


def _leave() -> None:
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


#: With which status a signal ends this process. Ray, inside which the signal arrives, makes 1 of any other than 0.
_status: int | None = None
atexit.register(_leave)  # before Ray is imported, so that it comes after what Ray does at the end

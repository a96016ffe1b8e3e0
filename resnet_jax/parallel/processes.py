"""The processes of one run: they connect, agree on what they do, and stop together.

JAX's coordination service, which process 0 starts, connects them and notices one that
died. Through its key-value store they tell each other, before a device is used, what
must be the same, and an error of one stops all. Nothing here waits for devices.
"""

import atexit
import collections
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.parallel import signals
from resnet_jax.parallel.signals import at_end as at_end

log = logging.getLogger(__name__)

# JAX notices a process that died or hangs after this many seconds, its default is 100.
HEARTBEAT_TIMEOUT = 30
# Clocks that differ by more seconds are told.
CLOCKS_MAY_DIFFER = 60
# Milliseconds; who fails or dies meanwhile stops all, so waiting needs no other end.
_FOREVER = 7 * 24 * 3600 * 1000
_STOP = "resnet_jax/stop"
# What the processes do when one gets a signal: the first that has something to save
# writes "save" here, the first that learns of the signal before that writes "end".
_FATE = "resnet_jax/fate"
# JAX's preemption service writes it when any process got a SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"

_listening: list[threading.Thread] = []
_turns: collections.Counter[str] = collections.Counter()
_told: dict[str, Any] = {"text": "", "code": 1}


def connect(
    address: str | None, number: int | None, index: int | None, timeout: float
) -> None:
    """Connects the processes of a run; JAX's first call.

    Args:
      address: HOST:PORT of process 0; None: a TPU pod, Slurm or Open MPI tells.
      number: of processes.
      index: of this one.
      timeout: seconds until all must be there.

    Raises:
      UserError: an argument cannot be, or process 0 cannot listen. Where no connection
        comes about, JAX aborts the process, which prints a sentence and exits with 1.
    """
    import jax

    if address and (number is None or index is None or not 0 <= index < number):
        raise UserError(
            f"--coordinator={address} needs --num_processes=N, the same for all, and"
            f" --process_id from 0 to N - 1, each for one; they are {number} and"
            f" {index}."
        )
    if address and not address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={address} must be HOST:PORT, of process 0.")
    where = address or "the coordinator"
    _say_when_aborted(
        f"{me(index)} could not join the run at {where} within {timeout:.0f} s. Check"
        " that all processes were started, with the same --num_processes and each with"
        " its own --process_id; that process 0 runs and its host and port are right"
        " and reachable from here (firewall; no HTTP_PROXY); and give hosts that start"
        " late more time with --initialization_timeout."
    )
    try:
        jax.distributed.initialize(
            address,
            number,
            index,
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if address:
            raise UserError(
                f"{me(index)} cannot connect at {address}: {reason}. Another program"
                " may listen there; take another port for all."
            ) from None
        raise UserError(
            f"--distributed finds no TPU pod, Slurm or Open MPI here ({reason}); give"
            " --coordinator=HOST:PORT, --num_processes and --process_id instead."
        ) from None
    _say_when_aborted(
        f"{me()} stops, since JAX gave up the connection of the run's processes; the"
        " reason stands above, most likely that another one died, whose log says why."
        " The same command goes on from the last checkpoint."
    )
    # JAX notes SIGTERM from here on, and the others are no different.
    signals.defer_to(pass_on)
    listen(_watch)
    listen(_end_unless_held)
    atexit.register(_disconnect)


def listen(function: Callable[[], None]) -> None:
    """Starts a thread that waits at the client; it ends when the client is closed."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    _listening.append(thread)


def pass_on(_: int) -> None:
    """Lets JAX's preemption service note a signal that it does not know."""
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_notice() -> bool:
    """Waits until any process got a signal; returns False if the run ends without."""
    return _wait_for(_NOTICE) is not None


def _wait_for(key: str) -> str | None:
    """Waits for a key; returns its value, or None when the connection is closed."""
    while True:
        try:
            return client().blocking_key_value_get(key, 60_000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return None  # the run has ended, or JAX aborts this process


def greatest(what: str, number: int) -> int:
    """Returns the greatest of a number of each process, of which each tells one.

    A thread may wait here while the main thread computes. If the run ends meanwhile, it
    returns the number of this process.
    """
    key = f"resnet_jax/{what}"
    with contextlib.suppress(Exception):
        client().key_value_set(f"{key}/{index()}", str(number))
    told = [_wait_for(f"{key}/{i}") for i in range(count())]
    return max(int(one or number) for one in told)


def hold() -> None:
    """Notes on all processes that there is something to save.

    From here on a signal is acted on where all processes can save together. Does not
    return if they agreed to end before.
    """
    if count() > 1 and _decide("save") == "end":
        signals.wait_for_the_end()


def _end_unless_held() -> None:
    """Ends this process, as all the others, if a signal comes before `hold`."""
    if wait_for_notice() and _decide("end") == "end":
        signals.tell(f"stopped by {signal.SIGTERM.name}")
        leave(128 + signal.SIGTERM)


def _decide(fate: str) -> str:
    """Writes what all do, unless another process was first; returns what stands."""
    with contextlib.suppress(Exception):
        client().key_value_set(_FATE, fate)
    return _wait_for(_FATE) or fate


def _disconnect() -> None:
    """Closes the connection while Python is whole, which threads in C++ need."""
    import jax

    jax.distributed.shutdown()
    for thread in _listening:
        thread.join(5)
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)


def client():
    """The client of JAX's coordination service; None for a process alone."""
    if "jax" not in sys.modules:
        return None
    # As Orbax gets it; there is no public name.
    from jax._src import distributed

    return distributed.global_state.client


def index() -> int:
    """Of this process, without touching a device."""
    if client() is None:
        return 0
    from jax._src import distributed

    return distributed.global_state.process_id


def count() -> int:
    """Of the run's processes, without touching a device."""
    if client() is None:
        return 1
    from jax._src import distributed

    return distributed.global_state.num_processes


def me(number: int | None = None) -> str:
    """This process in words."""
    who = index() if number is None else number
    return f"process {who} (host {socket.gethostname()}, pid {os.getpid()})"


# Agreeing.


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises UserError on all processes if one has other facts than process 0.

    Args:
      what: the facts are about.
      facts: by name, fit for JSON.
    """
    if count() == 1:
        return
    first = json.loads(_from_first(what, lambda: json.dumps([me(), dict(facts)])))
    agree(what, _difference(*first, json.loads(json.dumps(dict(facts)))))


def _difference(first: str, theirs: dict, ours: dict) -> str:
    for name in dict.fromkeys((*theirs, *ours)):
        one, other = (facts.get(name, "nothing") for facts in (theirs, ours))
        if one != other:
            return (
                f"The processes of the run differ in {name}: {first} has {one!r},"
                f" {me()} {other!r}; make them equal, and run the same command on all."
            )
    return ""


def check_clocks() -> None:
    """Warns on each process whose clock is not that of process 0."""
    if count() == 1:
        return
    agree("ready for clocks", "")
    ahead = time.time() - float(_from_first("clock", lambda: str(time.time())))
    if abs(ahead) > CLOCKS_MAY_DIFFER:
        log.warning(
            "%s: its clock is %.0f s %s that of process 0; times in logs and files will"
            " mislead. Set the clocks (NTP).",
            *(me(), abs(ahead), "ahead of" if ahead > 0 else "behind"),
        )


def first_does(what: str, function: Callable[[], str]) -> str:
    """What a function returns that process 0 alone calls; its UserError is all's."""
    if count() == 1:
        return function()
    result, problem = "", ""
    if index() == 0:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}."
    agree(what, problem)
    return _from_first(f"{what}, done", lambda: result)


def agree(what: str, problem: str) -> None:
    """Waits for all processes; raises UserError on all if one has a problem.

    Args:
      what: this is about.
      problem: of this process, or nothing. That of the first one is told.
    """
    if count() == 1:
        if problem:
            raise UserError(problem)
        return
    topic = _topic(what)
    client().key_value_set(f"{topic}/{index()}", problem or "-")
    found = _from_first(f"{what}, all", lambda: _first_problem(topic))
    if found != "-":
        raise UserError(found)


def _first_problem(topic: str) -> str:
    keys = (f"{topic}/{i}" for i in range(count()))
    problems = [client().blocking_key_value_get(key, _FOREVER) for key in keys]
    return next((problem for problem in problems if problem != "-"), "-")


def _from_first(what: str, make: Callable[[], str]) -> str:
    """What process 0 makes, on all."""
    key = _topic(what)
    if index() == 0:
        client().key_value_set(key, made := make())
        return made
    return client().blocking_key_value_get(key, _FOREVER)


def _topic(what: str) -> str:
    """A new key each time; the processes come by the same places in the same order."""
    _turns[what] += 1
    return f"resnet_jax/{what}/turn {_turns[what]}"


# Stopping.


def give_up(text: str) -> int:
    """Prints an error, also on the other processes, which stop; returns the exit code.

    With other processes it does not return: JAX would wait for them at the exit.
    """
    signals.wait_if_ending()
    if client() is not None:
        end_all(text)
    output.fail(text)
    return 1


def end_all(text: str, code: int = 1) -> NoReturn:
    """Prints an error on all processes and ends them, whatever else they do."""
    with signals.ending:
        _told["code"] = code
        signals.tell(f"error: {text}")
        if client() is not None:
            reason = json.dumps({"who": me(), "text": text, "code": code})
            # Another process may have been first.
            with contextlib.suppress(Exception):
                client().key_value_set(_STOP, reason)
            if index() == 0:
                time.sleep(3)  # the others read it from here
        signals.leave(code)


def give_up_after(error: BaseException) -> int:
    """As `give_up`, for an error that nobody foresaw; returns only if not alone.

    A process that dies breaks the collectives of the others, and an error of one is
    told to all: so what it says is waited for.
    """
    signals.wait_if_ending()
    if client() is None:
        raise error
    time.sleep(2)
    if _is_broken_collective(error):
        return give_up(
            f"{me()} lost another process of the run, which died or stopped; its log"
            " says why. The same command goes on from the last checkpoint."
        )
    output.note("".join(traceback.format_exception(error)).rstrip())
    return give_up(f"{me()} failed: {type(error).__name__}: {str(error)[:500]}")


def _is_broken_collective(error: BaseException) -> bool:
    signs = ("Gloo", "gloo", "NCCL", "Connection closed by peer", "UNAVAILABLE")
    return type(error).__name__ == "JaxRuntimeError" and any(
        sign in str(error) for sign in signs
    )


def leave(code: int) -> int:
    """Ends a process that stops as all do: together, or after some seconds alone."""
    if client() is None:
        return code
    with signals.ending:
        _told["code"] = code
        with contextlib.suppress(Exception):
            client().wait_at_barrier("resnet_jax/leave", 5000)
        if index() == 0:
            time.sleep(1)
        signals.leave(code)


def end_now(code: int, text: str) -> NoReturn:
    """Prints an error and ends this process whatever its other threads do."""
    with signals.ending:
        _told["code"] = code
        signals.tell(f"error: {text}")
        signals.leave(code)


def _watch() -> None:
    """Stops this process when another one says why it stopped."""
    if told := _wait_for(_STOP):
        reason = json.loads(told)
        end_now(reason["code"], f"{reason['who']} stopped: {reason['text']}")


def _say_when_aborted(text: str) -> None:
    """Lets the process say a sentence, and exit in order, when JAX aborts it.

    JAX's runtime calls abort() where processes cannot be connected or one dies, which
    Python cannot catch; what it prints is long.
    """
    _told["text"] = text
    if "handler" not in _told:
        _told["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, _told["handler"])


def _aborted(_: int) -> None:
    # Another thread may be telling why, and ends the process.
    if signals.ending.acquire(timeout=5):
        os.write(2, f"error: {_told['text']}\n".encode())
    signals.leave(_told["code"])

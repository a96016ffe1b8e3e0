"""The processes of one run: they connect, agree on what they do, and stop together.

JAX's coordination service, which runs in process 0 (the lead process), connects the
processes and notices when one dies. Through its key-value store they compare what must
be equal before a device is used, and an error of one process stops all. Nothing here
waits for devices.
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

# Seconds after which JAX notices that a process died or hangs. JAX's default is 100.
HEARTBEAT_TIMEOUT = 30
# Seconds by which the clocks of two processes may differ without a warning.
CLOCK_TOLERANCE = 60
# Seconds after which a process says for which other one it waits. Processes read data
# and compile at different speeds.
WAITING_TOLD_AFTER = 20.0
# The timeout, in milliseconds, of waiting for another process. It is a week, since a
# process that fails or dies meanwhile stops all others.
_FOREVER = 7 * 24 * 3600 * 1000
# The key under which the first process that stops writes why.
_STOP = "resnet_jax/stop"
# The key under which the processes decide what they do at a signal: the first that has
# something to save writes "save", the first that learns of a signal before that writes
# "end".
_FATE = "resnet_jax/fate"
# The key that JAX's preemption service writes when any process got a SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"

_listening: list[threading.Thread] = []
_turns: collections.Counter[str] = collections.Counter()
# The text that is printed when JAX aborts this process, and the exit code.
_last_words: dict[str, Any] = {"text": "", "code": 1}


def connect(
    address: str | None, number: int | None, index: int | None, timeout: float
) -> None:
    """Connects the processes of a run; this must be the first call of JAX.

    Args:
      address: HOST:PORT of process 0, or None to ask the TPU pod, Slurm or Open MPI.
      number: The number of processes.
      index: The index of this process, from 0 to `number - 1`.
      timeout: The time within which all processes must connect, in seconds.

    Raises:
      UserError: An argument is wrong, or process 0 cannot listen. If no connection is
        established, nothing is raised: JAX aborts the process, which prints one
        sentence and exits with code 1.
    """
    import jax

    if address and (number is None or index is None or not 0 <= index < number):
        raise UserError(
            f"--coordinator={address} needs --num_processes=N, equal on all processes,"
            " and --process_id, a different one from 0 to N - 1 on each process; they"
            f" are {number} and {index}."
        )
    if address and not address.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0.")
    _set_last_words(
        f"{describe(index)} could not join the run at {address or 'the coordinator'}"
        f" within {timeout:.0f} s. Check that all processes were started, with the same"
        " --num_processes and each with its own --process_id; and that process 0 runs,"
        " its host and port are right, and it can be reached from here (firewall; no"
        " HTTP_PROXY). If hosts start late, allow more time with"
        " --initialization_timeout."
    )
    try:
        with output.telling(
            f"{describe(index)} waits up to {timeout:.0f} s for the other processes of"
            f" the run at {address or 'the coordinator'}."
        ):
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
                f"{describe(index)} cannot connect at {address}: {reason}. Another"
                " program may listen there; use another port on all processes."
            ) from None
        raise UserError(
            f"--distributed finds no TPU pod, Slurm or Open MPI here ({reason}); give"
            " --coordinator=HOST:PORT, --num_processes and --process_id instead."
        ) from None
    _set_last_words(
        f"{describe()} stops because JAX closed the connection of the run's processes;"
        " the reason is printed above. Most likely another process died, and its log"
        " says why. The same command resumes from the last checkpoint."
    )
    # From here on JAX notes SIGTERM. Other signals are forwarded to have the same
    # effect.
    signals.defer_to(forward_as_sigterm)
    listen(_watch)
    listen(_end_unless_held)
    atexit.register(_disconnect)


def listen(function: Callable[[], None]) -> None:
    """Starts a thread that waits for keys; it ends when the connection is closed."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    _listening.append(thread)


def forward_as_sigterm(_: int) -> None:
    """Sends SIGTERM to this process, since JAX's preemption service notes no other."""
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_notice() -> bool:
    """Waits for a signal to any process; returns False if the run ends without one."""
    return _wait_for(_NOTICE) is not None


def _wait_for(key: str) -> str | None:
    """Waits for a key; returns its value, or None when the connection is closed."""
    while True:
        try:
            return client().blocking_key_value_get(key, 60_000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                # The run has ended, or JAX aborts this process.
                return None


def greatest(topic: str, number: int) -> int:
    """Returns the greatest of the numbers of all processes.

    A thread may wait here while the main thread computes. If the run ends meanwhile, it
    returns the number of this process.

    Args:
      topic: The name of the number, which is used once in a run.
      number: The number of this process.
    """
    key = f"resnet_jax/{topic}"
    with contextlib.suppress(Exception):
        client().key_value_set(f"{key}/{index()}", str(number))
    values = [_wait_for(f"{key}/{i}") for i in range(count())]
    return max(int(value or number) for value in values)


def hold() -> None:
    """Notes on all processes that there is something to save.

    From here on the run responds to a signal where all processes can save together.
    It does not return if the processes agreed to end before.
    """
    if count() > 1 and _decide("save") == "end":
        signals.wait_for_the_end()


def _end_unless_held() -> None:
    """Ends this process, like all others, if a signal comes before `hold`."""
    if wait_for_notice() and _decide("end") == "end":
        signals.tell(f"stopped by {signal.SIGTERM.name}")
        leave(128 + signal.SIGTERM)


def _decide(fate: str) -> str:
    """Writes what all processes do, unless another was first; returns the decision."""
    with contextlib.suppress(Exception):
        client().key_value_set(_FATE, fate)
    return _wait_for(_FATE) or fate


def _disconnect() -> None:
    """Closes the connection before Python is torn down, which its C++ threads need."""
    import jax

    jax.distributed.shutdown()
    for thread in _listening:
        thread.join(5)
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)


def client() -> Any:
    """Returns the client of JAX's coordination service, or None in a single process."""
    if "jax" not in sys.modules:
        return None
    # The client has no public name; Orbax imports it in the same way.
    from jax._src import distributed

    return distributed.global_state.client


def index() -> int:
    """Returns the index of this process, without using a device."""
    if client() is None:
        return 0
    from jax._src import distributed

    return distributed.global_state.process_id


def count() -> int:
    """Returns the number of the run's processes, without using a device."""
    if client() is None:
        return 1
    from jax._src import distributed

    return distributed.global_state.num_processes


def describe(number: int | None = None) -> str:
    """Returns a description of this process: its index, host and process id.

    Args:
      number: The index of this process, if it is not connected yet.
    """
    number = index() if number is None else number
    return f"process {number} (host {socket.gethostname()}, pid {os.getpid()})"


# Agreement.


def check_same(topic: str, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts.

    Args:
      topic: The subject of the facts.
      facts: Values by name, which JSON can represent.

    Raises:
      UserError: A process has other facts than process 0. It is raised on all
        processes, and names the first fact that differs.
    """
    if count() == 1:
        return
    lead = _from_lead(topic, lambda: json.dumps([describe(), dict(facts)]))
    lead_name, lead_facts = json.loads(lead)
    own_facts = json.loads(json.dumps(dict(facts)))
    agree(topic, _difference(lead_name, lead_facts, own_facts))


def _difference(lead_name: str, lead_facts: dict, own_facts: dict) -> str:
    """Returns a sentence on the first fact that differs, or ''."""
    for name in dict.fromkeys((*lead_facts, *own_facts)):
        lead, own = lead_facts.get(name, "nothing"), own_facts.get(name, "nothing")
        if lead != own:
            return (
                f"The processes of the run differ in {name}: {lead_name} has {lead!r},"
                f" {describe()} {own!r}; make them equal, and run the same command on"
                " all."
            )
    return ""


def check_clocks() -> None:
    """Warns on each process whose clock differs from that of process 0."""
    if count() == 1:
        return
    agree("ready for clocks", "")
    ahead = time.time() - float(_from_lead("clock", lambda: str(time.time())))
    if abs(ahead) > CLOCK_TOLERANCE:
        log.warning(
            "%s: its clock is %.0f s %s that of process 0, so times in logs and files"
            " are misleading. Set the clocks (NTP).",
            *(describe(), abs(ahead), "ahead of" if ahead > 0 else "behind"),
        )


def run_on_lead(topic: str, function: Callable[[], str]) -> str:
    """Calls a function in the lead process only, and returns its result on all.

    Args:
      topic: The name of the task.
      function: The function. Its UserError or OSError is raised as a UserError on all
        processes.
    """
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
    agree(topic, problem)
    return _from_lead(f"{topic}, done", lambda: result)


def agree(topic: str, problem: str) -> None:
    """Waits for all processes, and fails on all if one of them has a problem.

    Args:
      topic: The subject of the problem.
      problem: The problem of this process in a sentence, or ''.

    Raises:
      UserError: A process has a problem. The message is the problem of the process with
        the lowest index.
    """
    if count() == 1:
        if problem:
            raise UserError(problem)
        return
    key = _new_key(topic)
    client().key_value_set(f"{key}/{index()}", problem or "-")
    first = _from_lead(f"{topic}, all", lambda: _first_problem(topic, key))
    if first != "-":
        raise UserError(first)


def _first_problem(topic: str, key: str) -> str:
    """Waits for the problems of all processes; returns the first one, or '-'."""
    problems = [_get(f"{key}/{i}", topic, i) for i in range(count())]
    return next((problem for problem in problems if problem != "-"), "-")


def _from_lead(topic: str, make: Callable[[], str]) -> str:
    """Calls a function in the lead process, and returns its result on all."""
    key = _new_key(topic)
    if index() == 0:
        result = make()
        client().key_value_set(key, result)
        return result
    return _get(key, topic, 0)


def _get(key: str, topic: str, number: int) -> str:
    """Waits for a key of another process, and returns its value.

    Args:
      key: The key.
      topic: The subject of the value.
      number: The index of the process that writes it.
    """
    waiting = f"{describe()} waits for process {number} (topic: {topic})."
    with output.telling(waiting, after=WAITING_TOLD_AFTER):
        return client().blocking_key_value_get(key, _FOREVER)


def _new_key(topic: str) -> str:
    """Returns a new key for each call, the same on all processes.

    It counts the calls, which all processes make in the same order.
    """
    _turns[topic] += 1
    return f"resnet_jax/{topic}/turn {_turns[topic]}"


# Stopping.


def give_up(text: str) -> int:
    """Prints an error and returns the exit code of this process.

    With several processes it does not return, but prints the error on all and ends
    them: JAX would wait for the others at the exit.
    """
    signals.wait_if_ending()
    if client() is not None:
        end_all(text)
    output.fail(text)
    return 1


def end_all(text: str, code: int = 1) -> NoReturn:
    """Prints an error on all processes and ends them, whatever their threads do.

    Args:
      text: The error.
      code: The exit code of all processes.
    """
    with signals.ending:
        _last_words["code"] = code
        signals.tell(f"error: {text}")
        if client() is not None:
            reason = json.dumps({"who": describe(), "text": text, "code": code})
            # This fails if another process was first.
            with contextlib.suppress(Exception):
                client().key_value_set(_STOP, reason)
            if index() == 0:
                # The other processes need time to read it from this one.
                time.sleep(3)
        signals.leave(code)


def give_up_after(error: BaseException) -> int:
    """Gives up after an unexpected error; a single process raises it again.

    When a process dies, the collectives of the others break. So this first waits for
    the error of another process, which ends this one as well.
    """
    signals.wait_if_ending()
    if client() is None:
        raise error
    time.sleep(2)
    if _is_broken_collective(error):
        return give_up(
            f"{describe()} lost another process of the run, which died or stopped; its"
            " log says why. The same command resumes from the last checkpoint."
        )
    output.note("".join(traceback.format_exception(error)).rstrip())
    return give_up(f"{describe()} failed: {type(error).__name__}: {str(error)[:500]}")


def _is_broken_collective(error: BaseException) -> bool:
    signs = ("Gloo", "gloo", "NCCL", "Connection closed by peer", "UNAVAILABLE")
    return type(error).__name__ == "JaxRuntimeError" and any(
        sign in str(error) for sign in signs
    )


def leave(code: int) -> int:
    """Ends this process together with the others, or alone after some seconds.

    A single process only gets the exit code back.
    """
    if client() is None:
        return code
    with signals.ending:
        _last_words["code"] = code
        with contextlib.suppress(Exception):
            client().wait_at_barrier("resnet_jax/leave", 5000)
        if index() == 0:
            time.sleep(1)
        signals.leave(code)


def end_now(code: int, text: str) -> NoReturn:
    """Prints an error and ends this process, whatever its other threads do.

    Args:
      code: The exit code.
      text: The error.
    """
    with signals.ending:
        _last_words["code"] = code
        signals.tell(f"error: {text}")
        signals.leave(code)


def _watch() -> None:
    """Stops this process when another one writes why it stopped."""
    if value := _wait_for(_STOP):
        reason = json.loads(value)
        end_now(reason["code"], f"{reason['who']} stopped: {reason['text']}")


def _set_last_words(text: str) -> None:
    """Lets the process print a sentence, and exit in order, when JAX aborts it.

    JAX's runtime calls abort() when processes cannot be connected or one dies. Python
    cannot catch that, and what JAX prints is long.
    """
    _last_words["text"] = text
    if "handler" not in _last_words:
        _last_words["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, _last_words["handler"])


def _aborted(_: int) -> None:
    # Another thread may be printing the reason, and then ends the process.
    if signals.ending.acquire(timeout=5):
        os.write(2, f"error: {_last_words['text']}\n".encode())
    signals.leave(_last_words["code"])

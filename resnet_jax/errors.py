"""The exceptions of this package, and the sentences that they carry.

Every exception that the package raises on purpose is a `ResNetJaxError`:

- `UserError`: something that the user can fix, such as a contradictory config, a
  missing file or a full disk. Its message is a sentence that says what happened, to
  what, and what to do. Commands print it without a traceback and exit with code 1.
  - `BadValueError`: an argument of a function is not allowed, such as a field of a
    network's spec or the shape of a batch. It is also a `ValueError`.
  - `BadImageError`: an image cannot be decoded.
  - `resnet_jax.data.splits.SplitError`: a split or a slice of a split cannot be used.
  - `resnet_jax.weights.stored.UnreadableError`: a file of weights cannot be read.
  - `resnet_jax.data.loader.WorkerDiedError`: a process that decodes images was killed.
  - `resnet_jax.persistence.checkpoints.DamagedError`: a checkpoint was changed after it
    was saved; `GoneError` if its run removed it while it was read.
- `resnet_jax.persistence.preemption.PreemptedError`: a signal asked the run to stop,
  and it stopped. This is not a mistake, so it is not a `UserError`.
- `resnet_jax.bench.worker.LeftOutError`: a benchmark skips a baseline that cannot run
  here; `resnet_jax.bench.gpu.TooLateError` if no time was left for it.

Other exceptions, such as a plain `ValueError` or `AssertionError`, are errors in the
package or come from the libraries that it calls.
"""

import difflib
import errno
import fnmatch
import re
from collections.abc import Iterable


class ResNetJaxError(Exception):
    """The base class of all exceptions that this package raises on purpose."""


class UserError(ResNetJaxError):
    """Something that the user can fix; commands print it without a traceback."""


class BadValueError(UserError, ValueError):
    """An argument that is not allowed; the message says why and what is allowed."""


class BadImageError(UserError):
    """An image that cannot be decoded; the message names it."""


# The number of characters of a path or a value in a message.
_SHOWN = 200


def shortened(text: str) -> str:
    """Returns a text for a message, without its middle if it is long."""
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]}"


def shown(value: object) -> str:
    """Returns a value as Python writes it, for a message; shortened if it is long."""
    try:
        return shortened(repr(value))
    # Python writes no integer of more than 4,300 digits.
    except ValueError:
        return f"<{type(value).__name__} with too many digits>"


def reason_in_output(text: str) -> str:
    """Returns the reason for which a process failed, given what it printed.

    The reason is the line of the last exception, or otherwise the last line.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", x)]
    last = (errors or lines or ["it printed nothing"])[-1]
    return last.removeprefix(f"{__name__}.UserError: ")


# Problems of object stores with advice, each after the signs by which it is recognised:
# names of exceptions of google.auth, gcsfs and botocore, and texts of TensorStore and
# of the services.
_STORE_PROBLEMS = (
    (
        (
            "DefaultCredentialsError",
            "RefreshError",
            "NoCredentialsError",
            "PartialCredentialsError",
            "InvalidAccessKeyId",
            "InvalidClientTokenId",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "UNAUTHENTICATED",
            "Invalid Credentials",
            "Anonymous caller",
        ),
        "no valid credentials were found on this host; log in (gcloud auth"
        " application-default login, aws configure), or give the host a service account"
        " or a role",
    ),
    (
        (
            "PERMISSION_DENIED",
            "PermissionError",
            "AccessDenied",
            "Access Denied",
            "Forbidden",
        ),
        "this host's account does not have the permission; allow it to list, read,"
        " write and delete there, and at gs:// also storage.buckets.get",
    ),
    (
        ("NoSuchBucket", "bucket does not exist"),
        "there is no such bucket; create it, or correct the name",
    ),
    (
        (
            "EndpointConnectionError",
            "ConnectTimeoutError",
            "ReadTimeoutError",
            "ClientConnectorError",
            "ClientConnectorDNSError",
            "ServerTimeoutError",
            "FSTimeoutError",
        ),
        "the store does not answer; check the network of this host, and the endpoint if"
        " one is set",
    ),
)


def problem_of_store(error: BaseException | None) -> str:
    """Returns the problem of an object store that an error indicates, with advice.

    Args:
      error: An exception; its causes are searched as well.

    Returns:
      A clause without a full stop, or '' if the error has another reason.
    """
    while error is not None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        for signs, problem in _STORE_PROBLEMS:
            if any(sign in text for sign in signs):
                return f"{problem} ({text[:200]})"
        error = error.__cause__ or error.__context__
    return ""


# Parts of XLA's errors when a device has too little memory: the errors begin with the
# first, but those that come while a CPU computes contain only the second.
NO_MEMORY, _NO_MEMORY_LATER = "RESOURCE_EXHAUSTED", "Out of memory allocating"


def problem_of_memory(error: Exception) -> str:
    """Returns sentences on a device with too little memory, with advice.

    Args:
      error: An exception.

    Returns:
      The sentences, or '' if the error has another reason.
    """
    text = str(error)
    sign = NO_MEMORY if NO_MEMORY in text else _NO_MEMORY_LATER
    if type(error).__name__ != "JaxRuntimeError" or sign not in text:
        return ""
    reason = text[text.index(sign) :].splitlines()[0].rstrip(".")
    return (
        f"A device has too little memory for this run ({reason[:200]}). Start one with"
        " a smaller batch_size or data.image_size, or with gradient accumulation"
        " (--config.optim.microbatches=2); python -m resnet_jax.plan --largest prints"
        " the largest batch that fits. A run that has a checkpoint can only resume on"
        " more or larger devices, or with --config.sharding.params=fsdp."
    )


# Reasons for which a file system rejects an operation, each group with advice.
_FILE_PROBLEMS = (
    (("ENOSPC", "EDQUOT", "EFBIG"), "Free some space, or choose another place."),
    (
        ("EACCES", "EPERM", "EROFS"),
        "Change the permissions, or choose another place.",
    ),
    (
        ("ENOTDIR", "EEXIST", "EISDIR", "ELOOP", "ENOTEMPTY", "ENXIO"),
        "Move away what is at this path, or choose another one.",
    ),
    (("ENAMETOOLONG",), "Choose a shorter name."),
    (("EMFILE", "ENFILE"), "Raise the limit of open files (ulimit -n)."),
    (
        ("EIO", "ESTALE", "ENODEV", "ENOTCONN", "EHOSTDOWN", "EREMOTEIO", "ETIMEDOUT"),
        "Check the disk or the file server, and run the same command again.",
    ),
)
_FILE_ADVICE = {
    getattr(errno, name): advice for names, advice in _FILE_PROBLEMS for name in names
}


def problem_of(error: Exception, workdir: str) -> str:
    """Returns the message for an error of a library that a user can fix.

    Args:
      error: The error that ends a run.
      workdir: The run's directory, as the user named it.

    Returns:
      The problem of the object store, the file system or the memory of a device, in
      full sentences; '' for other errors.
    """
    if "://" in workdir and (problem := problem_of_store(error)):
        return f"{workdir} cannot be used: {problem}."
    if isinstance(error, OSError) and error.errno in _FILE_ADVICE:
        place = error.filename or workdir
        return f"{place}: {error.strerror}. {_FILE_ADVICE[error.errno]}"
    return problem_of_memory(error)


# The largest number of words that a sentence names.
MAX_KNOWN = 20


def check_known(what: str, word: str, known: Iterable[str]) -> None:
    """Checks that a word is one of the known ones.

    Args:
      what: The word as the message names it, such as `network 'resnet19'`.
      word: The word.
      known: The words that are allowed.

    Raises:
      UserError: It is unknown; the message names the nearest known words.
    """
    if word not in known:
        raise UserError(f"There is no {what}.{nearest(word, known)}")


def matching(what: str, patterns: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns the known names that match shell-style patterns, each of them once.

    Args:
      what: The kind of the names, such as `network`.
      patterns: The patterns, such as `resnet5*`, whose matches come in this order.
      known: The known names.

    Raises:
      UserError: A pattern matches no name; the message has the nearest names.
    """
    known = list(known)
    names: dict[str, None] = {}
    for pattern in patterns:
        matched = fnmatch.filter(known, pattern)
        if not matched:
            raise UserError(f"No {what} matches {pattern!r}.{nearest(pattern, known)}")
        names |= dict.fromkeys(matched)
    return list(names)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a hint at the known words that are nearest to an unknown one.

    Returns:
      " Did you mean A or B?", or " Known: A, B, C." if none is near. Of many words only
      the first ones are named.
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    shown = known[:MAX_KNOWN]
    others = len(known) - len(shown)
    more = f" and {others} others" if others else ""
    return f" Known: {', '.join(shown)}{more}."


def nearest_numbers(number: int, legal: Iterable[int]) -> str:
    """Returns "A or B", the nearest legal numbers below and above an illegal one."""
    legal = sorted(set(legal))
    below = [n for n in legal if n < number][-1:]
    above = [n for n in legal if n > number][:1]
    return " or ".join(str(n) for n in below + above)

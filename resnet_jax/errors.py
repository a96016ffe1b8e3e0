"""The exceptions of this package, and the sentences that they carry.

Every exception that the package raises on purpose is a `ResNetJaxError`:

- `UserError`: something that the user can fix, such as a config that cannot be, a file
  that is missing or a full disk. Its message is a sentence that says what happened, to
  what, and what to do. Commands print it without a traceback and exit with code 1.
  - `BadValueError`: an argument of a function that cannot be, such as a field of a
    network's spec or the shape of a batch. It is a `ValueError`, too.
  - `BadImageError`: an image that cannot be decoded.
  - `resnet_jax.data.loader.WorkerDiedError`: a process that decodes images was killed.
  - `resnet_jax.persistence.checkpoints.DamagedError`: a checkpoint that is not as it
    was saved.
- `resnet_jax.persistence.preemption.PreemptedError`: a signal asked the run to stop,
  and it did. It is not a mistake, so it is not a `UserError`.
- `resnet_jax.bench.worker.LeftOutError`: a benchmark leaves an implementation out that
  cannot run here; `resnet_jax.bench.gpu.TooLateError` if no time was left for it.

Other exceptions, such as a plain `ValueError` or `AssertionError`, are errors in the
package or come from the libraries that it calls.
"""

import difflib
import errno
import re
from collections.abc import Iterable


class ResNetJaxError(Exception):
    """The base class of all exceptions that this package raises on purpose."""


class UserError(ResNetJaxError):
    """Something that the user can fix; commands print it without a traceback."""


class BadValueError(UserError, ValueError):
    """An argument that cannot be; the message says why and what is possible."""


class BadImageError(UserError):
    """An image that cannot be decoded; the message names it."""


def reason_of(told: str) -> str:
    """Why a process failed: the last exception that it told, else its last line."""
    lines = [line for line in told.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", x)]
    last = (errors or lines or ["it said nothing"])[-1]
    return last.removeprefix(f"{__name__}.UserError: ")


# What is wrong where object stores' clients raise or say one of these, and what helps:
# google.auth, gcsfs and botocore by class, TensorStore and services in the text.
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
        "this host's account is not allowed to; give it the right to list, read, write"
        " and delete there, and at gs:// storage.buckets.get too",
    ),
    (
        ("NoSuchBucket", "bucket does not exist"),
        "there is no such bucket; make it, or mend the name",
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
    """What is wrong with an object store, and what to do; empty for other errors."""
    while error is not None:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        for signs, problem in _STORE_PROBLEMS:
            if any(sign in said for sign in signs):
                return f"{problem} ({said[:200]})"
        error = error.__cause__ or error.__context__
    return ""


# How XLA's errors begin where a device has too little memory, and what those say that
# come while a CPU computes.
NO_MEMORY, _NO_MEMORY_LATER = "RESOURCE_EXHAUSTED", "Out of memory allocating"


def problem_of_memory(error: Exception) -> str:
    """That a device has too little memory, and what to do; empty for other errors."""
    said = str(error)
    sign = NO_MEMORY if NO_MEMORY in said else _NO_MEMORY_LATER
    if type(error).__name__ != "JaxRuntimeError" or sign not in said:
        return ""
    reason = said[said.index(sign) :].splitlines()[0].rstrip(".")
    return (
        f"A device has too little memory for this run ({reason[:200]}). Start one with"
        " a smaller batch_size or data.image_size, or with gradient accumulation"
        " (--config.optim.microbatches=2); python -m resnet_jax.plan --largest tells"
        " what fits. A run that has a checkpoint can only resume on more or larger"
        " devices, or with --config.sharding.params=fsdp."
    )


# Reasons for which a file system rejects an operation, and which a user can fix.
_FILE_PROBLEMS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST),
}


def problem_of(error: Exception, workdir: str) -> str:
    """Returns the sentence for an error of a library that a user can fix.

    Args:
      error: The error that ends a run.
      workdir: The run's directory, as the user named it.

    Returns:
      What is wrong with the object store, the file system or the memory of a device;
      empty for other errors.
    """
    if "://" in workdir and (problem := problem_of_store(error)):
        return f"{workdir} cannot be used: {problem}."
    if isinstance(error, OSError) and error.errno in _FILE_PROBLEMS:
        return f"{error.filename or workdir}: {error.strerror}."
    return problem_of_memory(error)


def check_known(what: str, word: str, known: Iterable[str]) -> None:
    """Raises UserError that there is no `what`, unless the word is among the known."""
    if word not in known:
        raise UserError(f"There is no {what}.{nearest(word, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the nearest known words, or all if none."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Known: {', '.join(known)}."


def nearest_numbers(wanted: int, legal: Iterable[int]) -> str:
    """Returns 'A or B': the legal numbers next to `wanted` on either side."""
    legal = sorted(set(legal))
    below = [n for n in legal if n < wanted][-1:]
    above = [n for n in legal if n > wanted][:1]
    return " or ".join(str(n) for n in below + above)

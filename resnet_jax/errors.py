"""What a user did wrong, told in one sentence with the way out."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; `main` prints it without a traceback."""


class BadImageError(UserError):
    """An image that cannot be decoded; the message names it."""


# What object stores' clients raise or say where credentials are missing or not enough:
# google.auth, gcsfs and botocore by class, TensorStore and services in the text.
_REFUSALS = (
    "DefaultCredentialsError",
    "RefreshError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
)


def refusal_of_store(error: BaseException | None) -> str:
    """What an object store said when it let nobody in; empty for any other error."""
    while error is not None:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if any(sign in said for sign in _REFUSALS):
            return said[:300]
        error = error.__cause__ or error.__context__
    return ""


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

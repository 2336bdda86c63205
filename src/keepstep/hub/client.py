"""The client of the Hub that never waits for ever, and what its errors mean.

Facts of huggingface_hub 2.4: its client has no read timeout, many calls ask for none by name
(`repo_info`, every listing), and `Retry-After` is honoured without a bound; `create_commit` is not
retried. When to try again is tenacity's: the tries, the growing pauses and their jitter.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from keepstep.errors import KeepstepError

T = TypeVar("T")
TRIES = 6
# Seconds between tries: 1, 2, 4, 8, then 15, each up to a second longer, so that those whose push
# met the same fault, or each other, do not come back at the same moment.
PAUSES = wait_exponential(multiplier=1, max=15) + wait_random(0, 1)
READ_TIMEOUT = 60.0  # seconds without a byte
LONGEST_WAIT = 30  # seconds that a server may ask for, per request
FATAL = (400, 401, 403, 404, 413, 422)
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
NO_TOKEN = "there is no token: export HF_TOKEN=… (or `hf auth login`)"
MISTAKES = (TypeError, AttributeError, AssertionError)  # in a program, not of the Hub
# What the client makes of an answer by a proxy, or of a page about maintenance.
ODD_ANSWERS = (json.JSONDecodeError, UnicodeDecodeError, LookupError)


class HubError(KeepstepError):
    """What was asked of the Hub has not been done: what happened, and what to do.

    Attributes:
        fatal: no further try can mend it: the token, the name, the content.
    """

    def __init__(self, text: str, fatal: bool) -> None:
        super().__init__(text)
        self.fatal = fatal


def bounded_client() -> Any:
    """huggingface_hub's HTTP client, with a timeout for every request, whoever makes it."""

    def bound(request: Any) -> None:
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            name: min(asked.get(name) or READ_TIMEOUT, READ_TIMEOUT)
            for name in ("connect", "read", "write", "pool")
        }

    def shorten(response: Any) -> None:
        asked = response.headers.get("retry-after")
        if asked is not None and not (asked.isdecimal() and int(asked) <= LONGEST_WAIT):
            response.headers["retry-after"] = str(LONGEST_WAIT)
        response.headers.pop("ratelimit", None)  # as good as a Retry-After, to the client

    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], bound], "response": [shorten]}
    return client


def connect() -> HfApi:
    """With the token of the environment (`HF_TOKEN`)."""
    set_client_factory(bounded_client)
    return HfApi(library_name="keepstep")


def offline() -> str | None:
    """What in the environment keeps the client off the Hub: a variable's name."""
    on = ("1", "true", "yes", "on")
    return next((name for name in OFFLINE if os.environ.get(name, "").lower() in on), None)


def name_fault(repo_id: str) -> str | None:
    """Why this is no repository's name, None if it is one. (A bare one would be made, too.)"""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return f"{repo_id!r} is no repository name: owner/name ({brief(error)})"
    return None if "/" in repo_id else f"{repo_id!r} is no repository name: owner/name"


def with_patience(
    what: str, action: Callable[[], T], tries: int = TRIES, until: float = math.inf
) -> T:
    """Try again after what may pass; say at once what will not.

    Args:
        what: of which repository it is, for people.
        action: one try.
        tries: at most.
        until: no try begins later than that, but for the first; on the monotonic clock, in seconds.

    Raises:
        HubError: it could not be done.
    """
    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(tries) | stop_before_delay(until - time.monotonic()),
        wait=PAUSES,
        reraise=True,
    )
    try:
        return retrying(action)
    except (HubError, *MISTAKES):
        raise
    except Exception as error:
        if reason := _fatal(error):
            raise HubError(f"{what}: {reason}", fatal=True) from error
        done = retrying.statistics["attempt_number"]
        told = f"{done} {'try' if done == 1 else 'tries'}, the last: {brief(error)}"
        late = "" if done == tries else "; there was no time for another"
        raise HubError(f"{what}: {told}{late}", fatal=False) from error


def _may_pass(error: BaseException) -> bool:
    """Whether another try may mend it."""
    stays = not isinstance(error, Exception) or isinstance(error, (HubError, *MISTAKES))
    return not stays and _fatal(error) is None


def _fatal(error: BaseException) -> str | None:
    """What to say of an error that no further try can mend; None of any other."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{offline() or OFFLINE[0]} is set: unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, UnicodeEncodeError):  # in a header: nothing else of ours stands there
        return "the token holds a character that no token has: export HF_TOKEN=…"
    if isinstance(error.__cause__, HfHubHTTPError):  # "no answer", says the client of a 403
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        # A ValueError: the card or the name, as the client found it.
        wrong = isinstance(error, ValueError) and not isinstance(error, ODD_ANSWERS)
        return brief(error) if wrong else None
    status = error.response.status_code
    if status not in FATAL:
        return None
    hint = {
        401: "the token is not accepted: export HF_TOKEN=… (or `hf auth login`)",
        403: "the token may not write there: one with write access to that name is needed",
        404: "no such repository for this token: is the name right, and the token's access?",
    }.get(status, "the Hub rejects what was sent")
    return f"{status}: {hint} ({brief(error)})"


def brief(error: BaseException) -> str:
    """One line, without what a server may have echoed of a request."""
    if isinstance(error, ODD_ANSWERS):
        return f"an answer that is none of the Hub's ({type(error).__name__}: {error})"[:300]
    if error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        said, cause = (str(error) or type(error).__name__).splitlines()[0], brief(error.__cause__)
        return cause if said in cause else f"{said}: {cause}"
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]

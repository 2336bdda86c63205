"""What the errors of an object store mean: in a line, with a hint, and whether they would be so
again. By the texts of obstore 0.12, which has no fields for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from keepstep.mirror import credentials

STATUS = re.compile(r"status code: (\d{3}) ([A-Za-z ]*[A-Za-z])")
CODE = re.compile(r"<Code>([A-Za-z0-9]+)</Code>")  # of S3, Google Cloud Storage and Azure
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound")
# Where a machine's own credentials are looked for, when there are no others.
METADATA = re.compile(
    r"/latest/(api/token|meta-data)|169\.254\.169\.254|metadata\.google|/metadata/identity"
)
TRIES = re.compile(r"after (\d+) retries")
SILENT = re.compile(r"kind: Timeout")
ENDPOINT = re.compile(r"\b(https?://(?:\[[0-9a-f:]+\]|[\w.-]+)(?::\d+)?)(?=[/?\s,)]|$)")
UNREACHED = re.compile(r"kind: Connect")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken")
FULL = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "AccountQuotaExceeded")
ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint")
KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch")


@dataclass(frozen=True)
class Answer:
    """What a store said.

    Attributes:
        told: for people.
        fatal: it would be so again, until somebody has changed something.
    """

    told: str
    fatal: bool


def read_answer(scheme: str, what: str, text: str, is_refused: bool) -> Answer:
    """
    Args:
        scheme: of the store's address.
        what: was asked of it.
        text: of obstore's error.
        is_refused: the error's class says that nothing but a change will help.
    """
    status, code = STATUS.search(text), CODE.search(text)
    number, name = int(status[1]) if status else 0, code[1] if code else ""
    if NO_BUCKET.search(text) or (number == 404 and what.startswith("listing")):
        return Answer("there is no such bucket, and none is made", True)
    if METADATA.search(text):
        return Answer(f"no credentials\n    Hint: {credentials.hint(scheme)}", True)
    named = f", {name}" if name else ""
    cause = f"{number} {status[2]}{named}" if status else _silence(text)
    told = f"{what}: {cause}"
    if hint := hint_of(number, name):
        told += f"\n    Hint: {hint}"
    return Answer(told, is_refused or number in (401, 403) or name in EXPIRED)


def hint_of(status: int, code: str) -> str:
    """What a person can do about an answer; empty: wait."""
    if code in EXPIRED:
        return (
            "the credentials have expired. Each copy asks anew for those of a profile, a role or a "
            "token file; those in the environment stay what they were when the run was launched"
        )
    if code == "RequestTimeTooSkewed":
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        return f"this machine's clock says {now} UTC: set it (timedatectl set-ntp true)"
    if code in FULL or status == 507:
        return "the store is full: make room there, or keep less (mirror_total_limit)"
    if code in ELSEWHERE or status == 301:
        return "the bucket is in another region: AWS_REGION"
    if code in KEYS:
        return "the keys are not this store's: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL"
    if status == 403:
        return "the credentials must let it list, read, write and delete below this address"
    return ""


def _silence(text: str) -> str:
    """Of an error without an answer."""
    tries = TRIES.search(text)
    often = f", {int(tries[1]) + 1} times" if tries else ""
    if SILENT.search(text):
        return f"it did not answer{often}"
    if UNREACHED.search(text):
        endpoint = ENDPOINT.search(text)
        named = f"{endpoint[1]} cannot" if endpoint else "it cannot"
        return f"{named} be reached{often}"
    return text.splitlines()[0] if text else "it failed"

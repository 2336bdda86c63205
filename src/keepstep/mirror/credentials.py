"""Where the credentials of an S3 store come from, beside the environment.

obstore (0.12) takes them from `AWS_ACCESS_KEY_ID` …, a web identity, a container's or a machine's
metadata. It reads no `~/.aws`, knows no `AWS_PROFILE`, no single sign-on and no
`credential_process`: with boto3 installed, that is asked. Each copy is a process of its own, and
asks anew: what has been renewed meanwhile is taken.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

OF_OBSTORE = (
    *("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
LIFE = timedelta(minutes=5)  # then boto3 is asked again, which renews what it can
HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile of ~/.aws "
    "(AWS_PROFILE; boto3 reads it{boto3})",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}


def of_a_profile() -> Any:
    """What obstore asks for credentials of S3; None: its own way, by the environment.

    Raises:
        ValueError: the profile that is asked for does not exist, or is incomplete.
    """
    if any(os.environ.get(name) for name in OF_OBSTORE) or not _has_boto3():
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(ttl=LIFE)
    except ValueError:
        return None  # it knows of none either
    except Exception as error:  # botocore's: no such profile, a part of it is missing
        raise ValueError(f"{error} (AWS_PROFILE, ~/.aws)") from error


def hint(scheme: str) -> str:
    """What to set where there are none."""
    here = _has_boto3() or not (
        os.environ.get("AWS_PROFILE") or Path("~/.aws").expanduser().exists()
    )
    return HINTS[scheme].format(boto3="" if here else ", which is not installed: pip install boto3")


def _has_boto3() -> bool:
    return importlib.util.find_spec("boto3") is not None

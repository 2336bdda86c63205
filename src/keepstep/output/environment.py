"""An environment without secrets, for processes that unpickle. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

WORDS = "TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|KEYS?|OIDC|PAT"
NAME = re.compile(rf"(?:.*_)?(?:{WORDS})(?:_.*)?", re.IGNORECASE)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{12,}")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The same, but for what is named like a secret (HF_TOKEN, WANDB_API_KEY, …), or holds a token
    of the Hub's."""
    return {
        name: value
        for name, value in environment.items()
        if not NAME.fullmatch(name) and not TOKEN.search(value)
    }

"""An environment without secrets, for processes that unpickle; texts without them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

WORDS = (
    "TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|KEYS?|OIDC|PAT|NOTIFY_URL|WEBHOOKS?"
)
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


# Named like one, and none: `eos_token`, `max_new_tokens`.
HARMLESS = re.compile(r".*tokens.*|.*(?:eos|bos|pad|unk|sep|cls|mask|image)_token.*", re.IGNORECASE)
OPTION = re.compile(r"(--([\w-]+)[= ]\s*)(\S+)")
PASSWORD = re.compile(r"(\w://[^\s/@:]*:)[^\s/@]+@")
SHORTEST = 8  # characters of a secret of the environment that texts are searched for


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret."""
    plain = name.replace("-", "_")
    return NAME.fullmatch(plain) is not None and HARMLESS.fullmatch(plain) is None


def hidden(text: str, environment: Mapping[str, str]) -> str:
    """A text with `***` in the place of what must not be written down: values of options that are
    named like a secret, passwords of addresses, tokens, secrets of the environment."""
    text = OPTION.sub(lambda m: f"{m[1]}***" if is_secret(m[2]) else m[0], text)
    text = TOKEN.sub("***", PASSWORD.sub(r"\1***@", text))
    harmless = without_secrets(environment)
    for name, value in environment.items():
        if name not in harmless and len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return text

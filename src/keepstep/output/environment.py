"""An environment without secrets, for processes that unpickle; texts without them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, urlsplit

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
# As shells and `os.environ` write them; in prose "missing keys: …" tells what is missing.
ASSIGNED = re.compile(r"(\b([A-Z][A-Z0-9]*_[A-Z0-9_]+)[\"']?\s?[=:]\s?[\"']?)([^\s\"',]+)")
BEARER = re.compile(r"(\bBearer\s+)\S+", re.IGNORECASE)
PASSWORD = re.compile(r"(\w://[^\s/@:]*:)[^\s/@]+@")
SHORTEST = 8  # characters of a secret of the environment that texts are searched for


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret."""
    plain = name.replace("-", "_")
    return NAME.fullmatch(plain) is not None and HARMLESS.fullmatch(plain) is None


def hidden(
    text: str, environment: Mapping[str, str] | None = None, secrets: Iterable[str] | None = None
) -> str:
    """A text with `***` in the place of what must not be written down: values of options and
    variables that are named like a secret, passwords of addresses, tokens, secrets of the
    environment.

    Args:
        secrets: `secrets_in(environment)`, in the place of that.
    """
    text = OPTION.sub(lambda m: f"{m[1]}***" if is_secret(m[2]) else m[0], text)
    text = ASSIGNED.sub(lambda m: f"{m[1]}***" if is_secret(m[2]) else m[0], text)
    text = TOKEN.sub("***", PASSWORD.sub(r"\1***@", BEARER.sub(r"\1***", text)))
    for secret in secrets_in(environment or {}) if secrets is None else secrets:
        text = text.replace(secret, "***")
    return text


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """What an environment holds under the name of a secret, the longest first: as it is, quoted for
    an address, and of an address what follows the host, of several lines each."""
    harmless, found = without_secrets(environment), set[str]()
    for name, value in environment.items():
        if name in harmless:
            continue
        found.update((value, quote(value, safe=""), *value.splitlines()))
        try:
            parts = urlsplit(value)
        except ValueError:
            continue
        if parts.scheme and parts.netloc:
            found.add(value.partition(parts.netloc)[2].strip("/"))
    return sorted((text for text in found if len(text) >= SHORTEST), key=len, reverse=True)

"""Who may do what, and how the Hub says no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.hub.exchange import Exchange, Refusal
from tests.hub.store import Commit, Repo


@dataclass(frozen=True)
class User:
    """Whom a token stands for, and what it allows."""

    name: str
    role: Literal["read", "write"]
    organizations: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        return repo.split("/")[0] in (self.name, *self.organizations)

    def may_write(self, repo: str) -> bool:
        return self.role == "write" and self.owns(repo)


def known_user(exchange: Exchange) -> User:
    if exchange.user is None:
        raise Refusal(401, "Invalid username or password.")
    return exchange.user


def readable(exchange: Exchange, name: str) -> Repo:
    """The repository. One that is private does not exist for others, who may not even know of it.

    Callers without a token get 401 for that, others 404: so does the Hub.
    """
    user, peer = exchange.user, exchange.peer
    found = peer.store.repos.get(name)
    if found is None or (found.private and not (user and user.owns(name))):
        raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
    return found


def writable(exchange: Exchange, name: str) -> Repo:
    found = readable(exchange, name)
    if not known_user(exchange).may_write(name):
        message = "Forbidden: you must use a write token to upload to a repository."
        raise Refusal(403, message)
    return found


def commit_at(repo: Repo, revision: str) -> Commit:
    found = repo.find(revision)
    if found is None:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return found

"""The storage listener: signed addresses for LFS files, and Xet's content-addressed storage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.hub.exchange import Exchange, Refusal, route


def receive(exchange: Exchange) -> tuple[Path, str]:
    """The body in a temporary file, and its sha256."""
    file, digest = exchange.peer.store.temporary(), hashlib.sha256()
    with file.open("wb") as stream:
        for block in exchange.blocks():
            digest.update(block)
            stream.write(block)
    return file, digest.hexdigest()


def check_signature(exchange: Exchange) -> None:
    if not exchange.peer.is_signed(exchange.path):
        raise Refusal(403, "SignatureDoesNotMatch")


def check_token(exchange: Exchange) -> None:
    """Any token will do, but for the user's: that one must not come here."""
    token = (exchange.headers.get("Authorization") or "").removeprefix("Bearer ")
    if not token or token in exchange.peer.tokens:
        raise Refusal(401, "a token of Xet's is needed")


def get_object(exchange: Exchange, hash: str) -> None:
    check_signature(exchange)
    exchange.reply_file(exchange.peer.store.object(hash), {"ETag": f'"{hash}"'})


def put_object(exchange: Exchange, hash: str) -> None:
    check_signature(exchange)
    file, sha256 = receive(exchange)
    if sha256 != hash:
        raise Refusal(400, "BadDigest: the sha256 of the body is not the object's")
    os.replace(file, exchange.peer.store.object(hash))
    exchange.reply()


def put_part(exchange: Exchange, name: str, number: str) -> None:
    check_signature(exchange)
    file, sha256 = receive(exchange)
    exchange.peer.multiparts[name].parts[int(number)] = sha256, file
    exchange.reply(headers={"ETag": f'"{sha256}"'})


def get_xorb(exchange: Exchange, hash: str) -> None:
    check_signature(exchange)
    exchange.reply_file(exchange.peer.xet.xorbs / hash)


def put_xorb(exchange: Exchange, hash: str) -> None:
    check_token(exchange)
    file, _ = receive(exchange)
    target = exchange.peer.xet.xorbs / hash
    new = not target.exists()
    os.replace(file, target)
    exchange.reply({"was_inserted": new})


def put_shard(exchange: Exchange) -> None:
    check_token(exchange)
    exchange.peer.xet.add_shard(exchange.body())
    exchange.reply({"result": 1})


def reconstruction(exchange: Exchange, hash: str) -> None:
    check_token(exchange)
    peer = exchange.peer
    file = peer.xet.find(hash)
    if file is None:
        raise Refusal(404, "no such file")
    first, last = exchange.wanted_range(file.size) or (0, file.size - 1)
    addresses = {term.xorb: peer.sign(f"/xorb/{term.xorb}") for term in file.terms}
    exchange.reply(peer.xet.plan(file, first, last, addresses))


# What a newer client asks for first (/v2, /v1/chunks, /v1/xorb-grants) is answered with 404: then
# it does without.
ROUTES = [
    route("GET", "/object/{hash}", get_object),
    route("PUT", "/object/{hash}", put_object),
    route("PUT", "/part/{name}/{number}", put_part),
    route("GET", "/xorb/{hash}", get_xorb),
    route("POST", "/v1/xorbs/default/{hash}", put_xorb),
    route("POST", "/v1/shards", put_shard),
    route("GET", "/v1/reconstructions/{hash}", reconstruction),
]

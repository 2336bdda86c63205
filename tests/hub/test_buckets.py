"""The loopback Hub's buckets, as the real client sees them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.peer import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubPeer

BUCKET = "tester/bucket"
FILES = {
    "plain.txt": b"hello",
    "folder/with blank/ü%+.bin": b"hi",
    "empty": b"",
    "random": os.urandom(3_000_000),
    "repeats": b"12345678" * 20_000 + b"abc",
    "grouped": b"".join(i.to_bytes(4, "little") for i in range(1000, 60_000)),
}


@pytest.fixture
def user(hub: HubPeer, tmp_path: Path) -> Client:
    """With files to send, and a bucket for them. (Buckets know no other way than Xet.)"""
    client = Client(hub, tmp_path / "client", "xet")
    for name, content in FILES.items():
        path = client.folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    hub.create_bucket(BUCKET)
    return client


ADD = f"""
from pathlib import Path
files = [p for p in Path("files").rglob("*") if p.is_file()]
add = [(p if i % 2 else p.read_bytes(), str(p.relative_to("files"))) for i, p in enumerate(files)]
attempt(api.batch_bucket_files, "{BUCKET}", add=add)
"""


def test_there_and_back(hub: HubPeer, user: Client) -> None:
    """Every content comes back, whether its chunks are packed or not; its bytes are what their Xet
    hash says; and the storage never sees the token."""
    script = f"""
files = [(file, "back/" + file.path) for file in api.list_bucket_tree("{BUCKET}", recursive=True)]
api.download_bucket_files("{BUCKET}", files)
"""
    assert user.run(ADD + script) == ["done"]
    for name, content in FILES.items():
        held = hub.buckets.known[BUCKET].files[name]
        assert hub.store.object(held.sha256).read_bytes() == content
        assert (user.folder / "back" / name).read_bytes() == content
    assert hub.mentions(WRITE_TOKEN, "storage") == []


def test_sync(hub: HubPeer, user: Client) -> None:
    script = f"""
api.sync_bucket("files", "hf://buckets/{BUCKET}/deep/er", quiet=True)
api.sync_bucket("hf://buckets/{BUCKET}/deep/er", "copy", quiet=True)
"""
    user.run(script)
    for name, content in FILES.items():
        assert (user.folder / "copy" / name).read_bytes() == content


def test_listings_come_in_pages(tmp_path: Path) -> None:
    """What is asked for is a beginning of names, not a folder."""
    with HubPeer(tmp_path / "hub", page=2) as hub:
        hub.create_bucket(BUCKET)
        user = Client(hub, tmp_path / "client", "xet")
        script = f"""
names = ["a/1", "a/2", "a/b/3", "ab/4", "b & c"]
api.batch_bucket_files("{BUCKET}", add=[(b"x", name) for name in names])
for prefix, whole in ((None, True), (None, False), ("a", True), ("a", False), ("a/b", True),
                      ("no", True)):
    print([entry.path for entry in api.list_bucket_tree("{BUCKET}", prefix, recursive=whole)])
print([(f.path, f.size) for f in api.get_bucket_paths_info("{BUCKET}", ["a/1", "no", "a"])])
"""
        names = ["a/1", "a/2", "a/b/3", "ab/4", "b & c"]
        assert user.run(script) == [
            str(names),
            str(["a", "ab", "b & c"]),
            str(names[:4]),
            str(["a/1", "a/2", "a/b", "ab"]),
            str(names[2:3]),
            str([]),
            str([("a/1", 1)]),
        ]


def test_operations_one_by_one(hub: HubPeer, user: Client) -> None:
    """What fails of a batch is told, and the others are done."""
    script = f"""
from huggingface_hub.errors import BucketBatchError

(info,) = api.get_bucket_paths_info("{BUCKET}", ["random"])
def batch(**operations):
    try:
        api.batch_bucket_files("{BUCKET}", **operations)
        print("done")
    except BucketBatchError as error:
        print(error.response.status_code, error.failures)
copied = ("bucket", "{BUCKET}", info.xet_hash, "copies/random")
batch(copy=[copied], delete=["random"])
batch(copy=[("bucket", "{BUCKET}", "0" * 63 + "1", "nothing")])
batch(delete=["never there", "plain.txt"])
batch(delete=["never there"])
batch(add=[(b"x", "/odd"), (b"x", "even")])
print(api.bucket_info("{BUCKET}").total_files)
"""
    gone = [{"path": "never there", "error": "File not found"}]
    assert user.run(ADD + script) == [
        "done",
        "done",
        str(f"422 {[{'path': 'nothing', 'error': 'The source has no such file'}]}"),
        f"200 {gone}",
        f"422 {gone}",
        f"200 {[{'path': '/odd', 'error': 'Invalid path'}]}",
        "6",
    ]
    files = hub.buckets.known[BUCKET].files
    assert "copies/random" in files
    assert files["even"].size == 1
    assert not {"random", "plain.txt"} & set(files)


def test_chunks_that_are_there_are_not_sent_again(hub: HubPeer, user: Client) -> None:
    changed = f"""
data = Path("files/random").read_bytes()
api.batch_bucket_files("{BUCKET}", add=[(data + b"and a little more", "changed")])
"""
    user.run(ADD + changed)
    first, second = hub.requests("POST", "^/v1/xorbs/", "storage")
    assert first.received > 3_000_000
    assert second.received < 500_000


def test_what_was_changed_on_the_way_is_refused(hub: HubPeer, user: Client) -> None:
    """As by the real storage: a hash is of the content."""
    user.run(f'api.batch_bucket_files("{BUCKET}", add=[("files/random", "random")])')
    (xorb,) = hub.xet.xorbs.iterdir()
    data = bytearray(xorb.read_bytes())
    data[1_000_000] ^= 1
    xorb.write_bytes(data)
    (held,) = hub.buckets.known[BUCKET].files.values()
    script = f"""
copied = ("bucket", "{BUCKET}", "{held.xet_hash}", "copy")
attempt(api.batch_bucket_files, "{BUCKET}", copy=[copied])
"""
    assert user.run(script) == ["422 BucketBatchError"]


def test_buckets_come_and_go(hub: HubPeer, user: Client) -> None:
    script = """
print(api.create_bucket("new", private=True).bucket_id)
attempt(api.create_bucket, "tester/new")
print(api.create_bucket("tester/new", exist_ok=True).bucket_id)
attempt(api.create_bucket, "other/new")
print(sorted(bucket.id for bucket in api.list_buckets()))
api.delete_bucket("tester/new")
attempt(api.delete_bucket, "tester/new")
attempt(api.bucket_info, "tester/new")
"""
    assert user.run(script) == [
        "tester/new",
        "409 HfHubHTTPError",
        "tester/new",
        "403 HfHubHTTPError",
        "['tester/bucket', 'tester/new']",
        "404 BucketNotFoundError",
        "404 BucketNotFoundError",
    ]
    assert set(hub.buckets.known) == {BUCKET}


@pytest.mark.parametrize(
    ("token", "seen", "written"),
    [
        (WRITE_TOKEN, "done", "done"),
        (READ_TOKEN, "done", "403 HfHubHTTPError"),
        (OTHER_TOKEN, "404 BucketNotFoundError", "404 BucketNotFoundError"),
        (None, "401 BucketNotFoundError", "401 BucketNotFoundError"),
        (WRITE_TOKEN[:-1] + "y", "401 HfHubHTTPError", "401 HfHubHTTPError"),
    ],
    ids=["write", "read", "foreign", "none", "wrong"],
)
def test_what_a_token_may(
    hub: HubPeer, user: Client, token: str | None, seen: str, written: str
) -> None:
    hub.buckets.known[BUCKET].files.clear()
    script = f"""
attempt(lambda: list(api.list_bucket_tree("{BUCKET}")))
attempt(api.batch_bucket_files, "{BUCKET}", delete=["x"])
"""
    there = "422 BucketBatchError" if written == "done" else written
    assert user.run(script, token) == [seen, there]


def test_another_peer_goes_on_in_the_folder(hub: HubPeer, user: Client) -> None:
    user.run(ADD)
    hub.stop()
    with HubPeer(hub.store.folder) as again:
        user.hub = again
        user.run(f'api.download_bucket_files("{BUCKET}", [("random", "back")])')
        assert (user.folder / "back").read_bytes() == FILES["random"]

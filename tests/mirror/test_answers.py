"""What a store that is not there is called: by its endpoint."""

from __future__ import annotations

import pytest

from keepstep.mirror.answers import read_answer

TEXT = """Error performing GET {}/b?list-type=2&prefix=x%2F in 103ms, after 3 retries
 - HTTP error: error sending request
uri: Some(
    {}/b?list-type=2,
),
kind: Connect"""


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "https://minio.example.com", "http://[::1]:9000"]
)
def test_the_endpoint_is_named(endpoint: str) -> None:
    answer = read_answer("s3", "listing it", TEXT.format(endpoint, endpoint), False)
    assert answer.told == f"listing it: {endpoint} cannot be reached, 4 times"


def test_credentials_in_an_endpoint_are_not_said() -> None:
    text = TEXT.format(*2 * ["http://key:secret@host:9"])
    told = read_answer("s3", "listing it", text, False).told
    assert told == "listing it: it cannot be reached, 4 times"

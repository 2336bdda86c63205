"""Lines of samples.jsonl: torn, damaged, and of steps that were done again."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.samples import Sample, exact_match, lines_of, read_lines

TEXT = st.text(max_size=20)
PROMPTS = 2


def of_step(step: int, attempt: int) -> list[Sample]:
    return [Sample(step, n, f"p{n}", f"{attempt}") for n in range(1, PROMPTS + 1)]


@given(TEXT, TEXT, st.none() | TEXT)
def test_what_is_written_is_read(prompt: str, completion: str, reference: str | None) -> None:
    samples = [Sample(3, n, prompt, completion, reference) for n in (1, 2)]
    assert read_lines("\n".join(lines_of(samples, 1, "now"))) == samples


BEGINNING = st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans())


@given(st.lists(BEGINNING, min_size=1, max_size=6))
def test_a_step_that_was_done_again_has_the_last_answer(
    beginnings: list[tuple[int, int, bool]],
) -> None:
    """An attempt, or one that goes back, goes on from a step that was reached, and evaluates each
    of its steps."""
    lines: list[str] = []
    expected: dict[int, int] = {}
    attempt = 0
    for number, (back, steps, same_attempt) in enumerate(beginnings, 1):
        attempt += not same_attempt or not attempt
        start = max(0, max(expected, default=0) - back)
        expected = {step: a for step, a in expected.items() if step <= start}
        for step in range(start + 1, start + steps + 1):
            expected[step] = number
            lines += lines_of(of_step(step, number), attempt, "now")
    found = read_lines("\n".join(lines))
    assert [(s.step, s.completion) for s in found] == [
        (step, str(expected[step])) for step in sorted(expected) for _ in range(PROMPTS)
    ]


@given(st.integers(0, 400), st.data())
def test_a_torn_line_costs_itself(place: int, data: st.DataObject) -> None:
    """A killed attempt leaves a part; the next one closes the line, and writes the step again."""
    first, second = (
        "\n".join(lines_of(of_step(4, n), n, "2026-11-27T10:00:00+00:00")) for n in (1, 2)
    )
    torn = first[: min(place, len(first) - 1)]
    text = f"{torn}\n{second}\n" if torn else second
    assert read_lines(text) == of_step(4, 2)
    kept = read_lines(torn)
    assert kept == of_step(4, 1)[: len(kept)]
    at = data.draw(st.integers(0, len(second) - 1))
    flipped = second[:at] + chr(ord(second[at]) ^ 1) + second[at + 1 :]
    assert set(read_lines(flipped)) <= set(of_step(4, 2))


def test_what_is_no_sample_is_passed_by() -> None:
    (line,) = lines_of([Sample(1, 1, "p", "c")], 1, "now")
    values = json.loads(line)
    others = [
        "",
        "{}",
        "[1]",
        "nonsense",
        json.dumps(values | {"step": "1"}),
        line.replace("p", "q"),
    ]
    unchecked = json.dumps({n: v for n, v in values.items() if n != "check"})
    assert read_lines("\n".join([*others, unchecked, line])) == [Sample(1, 1, "p", "c")]


def test_exact_match() -> None:
    right, wrong = Sample(1, 1, "p", " yes\n", "yes"), Sample(1, 2, "p", "Yes", "yes")
    assert exact_match([right, wrong, Sample(1, 3, "p", "c")]) == 0.5
    assert exact_match([Sample(1, 3, "p", "c")]) is None
    assert exact_match([]) is None

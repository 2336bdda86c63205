"""What a model answered to a recipe's prompts, step by step: lines of samples.jsonl. Pure: no disk.

A line may be lost, torn, or of a step that a later attempt made again: then that attempt's count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from keepstep.policy.strict import TextError, build, checked, with_check


@dataclass(frozen=True)
class Sample:
    """A completion.

    Attributes:
        step: optimizer steps that the model had made.
        number: of the prompt in its file, from 1.
        prompt: as people read it.
        completion: what the model wrote, without its special tokens.
        reference: what it is compared with; None: nothing.
    """

    step: int
    number: int
    prompt: str
    completion: str
    reference: str | None = None

    @property
    def matches(self) -> bool:
        """Whether the completion is the reference, but for space around it."""
        return self.reference is not None and self.completion.strip() == self.reference.strip()


def exact_match(samples: Iterable[Sample]) -> float | None:
    """The share of those with a reference that match it; None: there are none."""
    compared = [sample.matches for sample in samples if sample.reference is not None]
    return sum(compared) / len(compared) if compared else None


def lines_of(samples: Sequence[Sample], attempt: int, time: str) -> list[str]:
    """As they are written down."""
    told = {"time": time, "attempt": attempt}
    return [with_check(json.dumps(told | asdict(sample))) for sample in samples]


def read_lines(text: str) -> list[Sample]:
    """Those that count, in the order of steps and prompts.

    A run that goes back, in another attempt or in the same one, makes its later steps again: what
    was written of them before counts no more.
    """
    found: dict[int, dict[int, Sample]] = {}
    last = (0, 0)  # attempt, step
    for line in text.split("\n"):
        try:
            values, has_check = checked(line)
            if not has_check:
                continue
            attempt = build(int, values.pop("attempt", None), "attempt")
            values.pop("time", None)
            sample = build(Sample, values, "sample")
        except (TextError, ValueError):
            continue
        if attempt != last[0] or sample.step < last[1]:
            found = {step: those for step, those in found.items() if step < sample.step}
        last = attempt, sample.step
        found.setdefault(sample.step, {})[sample.number] = sample
    return [those[number] for _, those in sorted(found.items()) for number in sorted(those)]

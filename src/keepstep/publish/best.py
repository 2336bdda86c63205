"""Which of two weights is better, the Hub's or ours. Pure: no disk, no network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

from keepstep.policy.strict import TextError, build, parse

BEST_FILE = "training/best.json"
Verdict = Literal["same", "ours", "theirs", "unlike"]


@dataclass(frozen=True)
class Best:
    """What `training/best.json` says of the weights beside it.

    Attributes:
        run_id: the run that they are of.
        global_step: optimizer steps behind them.
        metric: what the run ranks its checkpoints by; None: by age.
        value: of the metric; None without one.
        greater_is_better: of the metric.
        measured_on: a digest of evaluation rows and base model: what makes values of two runs
            comparable.
        weights: file → sha256, in hex.
    """

    run_id: str
    global_step: int
    metric: str | None
    value: float | None
    greater_is_better: bool
    measured_on: str
    weights: dict[str, str]

    @property
    def digest(self) -> str:
        """Of all weights together."""
        return hashlib.sha256(json.dumps(sorted(self.weights.items())).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Best:
        """Of a later version, too. What is not readable is like nothing of ours."""
        try:
            values = parse(text)
            best: Best = build(Best, {f.name: values[f.name] for f in fields(Best)})
        except (TextError, TypeError, KeyError):
            return UNREADABLE
        return best

    def compare(self, theirs: Best | None) -> Verdict:
        """Whose weights should be on the Hub, ours or `theirs`, which are there.

        Values that cannot be compared, of another metric or on other data, are `unlike`; equal
        ones leave what is there. Ranked by age, the later step of the same run wins.
        """
        if theirs is None:
            return "ours"
        if theirs.digest == self.digest:
            return "same"
        if self._scale() != theirs._scale():
            return "unlike"
        if self.value is None or theirs.value is None:
            if self.run_id != theirs.run_id:
                return "unlike"
            return "ours" if self.global_step > theirs.global_step else "theirs"
        gain = self.value - theirs.value
        return "ours" if (gain if self.greater_is_better else -gain) > 0 else "theirs"

    def _scale(self) -> tuple[object, ...]:
        return self.metric, self.greater_is_better, self.measured_on


UNREADABLE = Best("unknown", 0, "unreadable", None, False, "unknown", {})

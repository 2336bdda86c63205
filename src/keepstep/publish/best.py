"""Which of two weights is better, the Hub's or ours. Pure: no disk, no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        weights: file → sha256, in hex.
    """

    run_id: str
    global_step: int
    metric: str | None
    value: float | None
    greater_is_better: bool
    weights: dict[str, str]

    @property
    def digest(self) -> str:
        """Of all weights together."""
        return hashlib.sha256(json.dumps(sorted(self.weights.items())).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Best | None:
        """None: it is not ours to understand."""
        try:
            values: Mapping[str, Any] = json.loads(text)
            return Best(**values)
        except (ValueError, TypeError):
            return None

    def compare(self, theirs: Best | None) -> Verdict:
        """Whose weights should be on the Hub, ours or `theirs`, which are there.

        A metric that nobody can compare with ours is `unlike`; equal values leave what is there.
        Ranked by age, the later step of the same run wins.
        """
        if theirs is None:
            return "ours"
        if theirs.digest == self.digest:
            return "same"
        if self.metric != theirs.metric or self.greater_is_better != theirs.greater_is_better:
            return "unlike"
        if self.value is None or theirs.value is None:
            later = self.run_id == theirs.run_id and self.global_step > theirs.global_step
            return "ours" if later else "unlike" if self.run_id != theirs.run_id else "theirs"
        gain = self.value - theirs.value
        return "ours" if (gain if self.greater_is_better else -gain) > 0 else "theirs"

"""Early stopping, by whichever of several evaluation sets has the metric that ranks."""

from __future__ import annotations

from typing import Any

import transformers


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """transformers' own, by its name, which its count is stored under.

    It is told of each evaluation set, and says (transformers 5.23) of each that lacks the metric
    that early stopping is disabled.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if args.metric_for_best_model in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)

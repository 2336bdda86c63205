"""What an evaluation says of single tokens, exactly: sums over all rows, each of them once.

A user's metrics join them.

TRL (1.16) takes the mean of each batch's mean, and of the last batch on several processes whichever
ranks come first. Here every token counts as much as any other, and rows that only fill up the last
batch count nothing: the same on any number of processes, in batches of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from keepstep.trainer.own_metrics import OwnMetrics

PROBE = "is_top1"  # an output of TRL's head that the model itself does not have


class TokenCounts:
    """Sums over the tokens of one evaluation that are predicted: on this rank, on its device.

    Attributes:
        is_finite: whether the losses of all of them are, on all ranks; once they are summed.
    """

    def __init__(self, accelerator: Any, loader: Any, own: OwnMetrics | None = None) -> None:
        """
        Args:
            accelerator: the Trainer's.
            loader: of the evaluation's rows; as Accelerate has prepared it.
            own: what a user counts.
        """
        self._accelerator, self._loader, self._own = accelerator, loader, own
        self.is_finite = True
        if own is not None:
            own.begin()
        self._sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)

    def watching(self, model: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
        """The model, so that its outputs for a batch are counted. Ranks: any; all, where a user's
        metrics are."""
        labels = inputs["labels"]

        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            if getattr(outputs, PROBE, None) is not None:
                part = self._real(labels)
                self._add(outputs, part)
                if self._own is not None:
                    self._own.add(model, kwargs, outputs, part)
            return outputs

        return watched

    def _add(self, outputs: Any, part: Any) -> None:
        mask = outputs.label_mask
        real = torch.zeros_like(mask)
        real[part] = True
        mask = mask & real
        # What stands where nothing is predicted may be NaN.
        loss, entropy = (torch.where(mask, o, 0) for o in (-outputs.log_probs, outputs.entropy))
        parts = (mask, outputs.is_top1 * mask, loss, entropy)
        self._sums += torch.stack([part.detach().sum(dtype=torch.float64) for part in parts])

    def _real(self, labels: Any) -> Any:
        """Which part of a batch is not there only to fill it up (Accelerate 1.15: on several
        processes, the last batches are filled up with the first rows)."""
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return slice(None)
        rank, size = self._accelerator.process_index, self._loader_batch(labels)
        left = min(max(state.remainder - rank * size, 0), size)
        if len(labels) == size or left in (0, size):
            return slice(left)
        return slice(None), slice(max(0, self._tokens(rank * size, left) - 1))

    def _loader_batch(self, labels: Any) -> int:
        """How many rows a rank's batch has. Without padding, they stand in one line."""
        if len(labels) > 1:
            return len(labels)
        return int(self._loader.total_batch_size // self._accelerator.num_processes)

    def _tokens(self, first: int, count: int) -> int:
        """How long the last round's rows from `first` on are together."""
        rows, state = self._loader.dataset, self._accelerator.gradient_state
        begin = len(rows) - state.remainder + first
        return sum(len(rows[index]["input_ids"]) for index in range(begin, begin + count))

    def summed(self) -> dict[str, float]:
        """Of all ranks together; empty where nothing was predicted. Ranks: all (collective)."""
        own = {} if self._own is None else self._own.means()
        tokens, right, loss, entropy = self._accelerator.reduce(self._sums).tolist()
        if not tokens:
            return own
        mean, self.is_finite = loss / tokens, math.isfinite(loss)
        return {
            "mean_token_accuracy": right / tokens,
            "perplexity": math.inf if mean >= 700 else math.exp(mean),
            "entropy": entropy / tokens,
            **own,
        }

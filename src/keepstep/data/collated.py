"""Rows with images as tokens: what SFTTrainer's collator (trl 1.16) makes of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from keepstep.data.common import Rows
from keepstep.recipe.config import KeepstepConfig


class Collated:
    """As `Preparation` makes tokens of text: here the collator does, row by row, in the run too."""

    def __init__(
        self,
        processor: Any,
        training: KeepstepConfig,
        first: Mapping[str, Any],
        chat_template: str | None,
    ) -> None:
        """
        Args:
            processor: with the chat template that will be used.
            training: the recipe's training fields.
            first: row.
            chat_template: what TRL takes in the place of the processor's own; None: nothing.
        """
        completion_only = training.completion_only_loss
        if completion_only is None:
            completion_only = {"prompt", "completion"} <= first.keys()
        self.processor = processor
        self._collate = DataCollatorForVisionLanguageModeling(
            processor=processor,
            completion_only_loss=completion_only,
            dataset_text_field=training.dataset_text_field,
            assistant_only_loss=training.assistant_only_loss,
            chat_template=chat_template,
        )

    def prepared(self, rows: Rows, what: str) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of a few rows, of their full length."""
        return [self._tokens(row) for row in rows]

    def _tokens(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        batch = self._collate([dict(row)])
        return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}

"""SFT computes as fast as it safely can: what it takes, and how that is put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import PeftModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from keepstep.policy.kernels import Kernels, Lacks, choose, lacks, of_all
from keepstep.preflight.kernels import asked_of, machine_of
from keepstep.ranks import collectives
from keepstep.trainer.given import sees_images
from keepstep.trainer.sequence_mixin import SequenceMixin


class KernelsMixin(SequenceMixin):
    """Settled when it is known what an attempt goes on from, since a run keeps what it began with.

    Overridden (trl 1.16): `get_train_dataloader`: batches without padding, where that is chosen.
    """

    kernels: Kernels | None = None
    data_collator: Any

    def _for_trainer(self, asked: Any, given: Mapping[str, Any]) -> Any:
        args = super()._for_trainer(asked, given)
        own = given.get("data_collator") is not None or sees_images(given)
        if not (args.packing or own):
            # SFTTrainer (1.16) would not cut rows without padding to `max_length`, it says; they
            # are cut before. And the mean of an evaluation would be one of batches, not of rows.
            args.padding_free = False
        return args

    def take_kernels(self, began: Mapping[str, Any] | None) -> Kernels:
        recipe, given = self.attempt.recipe, self._given.get("model")
        machine = machine_of(self.args)
        known: dict[str, Any] = {}
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            known["text"] = False
        if self.sequences is not None:  # attention is what Ulysses exchanges the heads of
            known |= {"text": False, "attention": self.sequences.sp_handler.sp_attn_implementation}
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if not self._is_given_attempt and not isinstance(given, str):
            known["attention"] = base.config._attn_implementation  # whoever built it has chosen
        asked = asked_of(recipe, base, machine, **known)
        own = lacks(asked, machine)
        lacking = of_all(collectives.gather_some(own if own != Lacks() else None))
        self.kernels = chosen = choose(asked, lacking, began)
        if chosen.attention != base.config._attn_implementation:
            collectives.on_all(
                "taking flash attention", lambda: base.set_attn_implementation(chosen.attention)
            )
        if chosen.liger and not self.args.use_liger_kernel:
            # As SFTTrainer does: its own head takes the place of Liger's.
            config = {**(self.args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
            self.args.liger_kernel_config = config
        self.args.use_liger_kernel = chosen.liger
        return chosen

    def get_train_dataloader(self) -> Any:
        collator = self.data_collator
        if self.kernels is not None and self.kernels.padding_free and not self.args.packing:
            self.data_collator = replace(collator, padding_free=True)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

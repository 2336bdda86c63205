"""`CheckpointMixin`: any transformers Trainer, killed at any moment and carried on.

One mixin for each concern, and what they share:

- `rows_mixin`: which rows a step has;
- `evaluation_mixin`: evaluations that a stop cuts short;
- `resume_mixin`: the state of a checkpoint, given back;
- `saving_mixin`: saves, committed;
- `description_mixin`: what a manifest says of a step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstep.data.rows import Count
from keepstep.policy.batch import Batch
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.reader import Checkpoint
from keepstep.save.manager import CheckpointManager
from keepstep.trainer.dealing import plan_rows
from keepstep.trainer.description_mixin import DescriptionMixin
from keepstep.trainer.evaluation_mixin import EvaluationMixin
from keepstep.trainer.pacing import EveryStep
from keepstep.trainer.resharded import Resharded
from keepstep.trainer.resume_mixin import ResumeMixin
from keepstep.trainer.rows_mixin import RowsMixin
from keepstep.trainer.saving import Saving
from keepstep.trainer.saving_mixin import SavingMixin
from keepstep.trainer.state import Contents
from keepstep.trainer.upstream_check import check


class CheckpointMixin(RowsMixin, EvaluationMixin, SavingMixin, DescriptionMixin, ResumeMixin):
    """A Trainer whose checkpoints are committed by a `CheckpointManager`.

    Attributes:
        about: what the model card says of the run.
        start: the checkpoint whose state training goes on with, None for the beginning.
        asked: how the recipe shares out the rows of a step; `args.batch` is how it is done.
        rows: which rows the steps have.
        resharded: what had to be done to give the state of `start` to these processes, or None.
        evaluation_due_at: the newest step with an evaluation, None before the first.
        preempted: why training stopped before its end, None when it did not.
        saving: its saves, and what came of them.
        sources, counts: `training` and `evaluation`: where the rows come from, and what became of
            them when they were made into tokens.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whether the Trainer that is extended, and all else of other libraries, is as known."""
        super().__init_subclass__(**kwargs)
        check(cls, CheckpointMixin)

    def __init__(
        self,
        *args: Any,
        manager: CheckpointManager,
        settings: dict[str, Any] | None = None,
        start: Checkpoint | None = None,
        asked: Batch | None = None,
        about: dict[str, Any] | None = None,
        sources: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.sources = sources or {}
        self.counts: dict[str, Count] = {}
        super().__init__(*args, **kwargs)
        self.manager = manager
        self.settings = settings or {}
        self.about = about or {}
        self.start = start
        self.asked: Batch = asked or self.args.batch
        self.rows = plan_rows(self.train_dataset, self.args, start.manifest if start else None)
        self._shown = contextlib.ExitStack()  # closed when all is loaded
        self._seen: Checkpoint | None = None  # `start`, as loaders are shown it
        self.resharded: Resharded | None = None
        self.evaluation_due_at: int | None = None
        self.preempted: str | None = None
        self.saving = Saving(self)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._logged: dict[str, float] = {}
        self._finite: Any = True
        self._random_numbers: list[Any] | None = None  # as they are where the attempt starts
        self._pass = 0, 0  # of the data: its number, and the step at which it began
        self.contents = Contents(self)
        # Retention is the manager's: with a limit of 1, Trainer deletes folders at the end.
        self.args.save_total_limit = None
        self.every_step = EveryStep(self)
        self.add_callback(self.every_step)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train from `start`, with its whole state, to the end. Ranks: all (collective).

        Args:
            resume_from_checkpoint: nothing, or the path of `start`.

        Raises:
            ValueError: another checkpoint is named, or was chosen, than `start`: its state would
                not be restored.
        """
        start, chosen = (c.path.resolve() if c else None for c in (self.start, self.manager.chosen))
        named = resume_from_checkpoint or None
        other = named is not None and (named is True or Path(named).resolve() != start)
        if other or start != chosen:
            raise ValueError(
                f"start is {_name(start)}, the manager has chosen {_name(chosen)}, and train() is "
                f"given {named}: only the state of `start` is restored\n"
                "    Hint: checkpoint, choice = manager.choose(...); KeepstepTrainer(start="
                "checkpoint unless choice.weights_only, ...); train()"
            )
        self.manager.begin_training()
        with self._shown:
            if self.start is not None:
                self._seen = self._shown.enter_context(only_listed(self.start))
            path = str(self._seen.path) if self._seen else None
            return super().train(path, *args, **kwargs)

    def may_stop_early(self) -> dict[str, Any]:
        """What may end the run before its last planned step, as far as the recipe says it."""
        policy, patience = self.manager.policy, self.args.early_stopping_patience
        ranked = {"metric": policy.metric, "greater_is_better": policy.greater_is_better}
        return {} if patience is None else {"patience": patience, **ranked}

    def remarks(self) -> Sequence[str]:
        """What else a person should know of this training, a line each. Ranks: any."""
        return ()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._shown.close()
        self.every_step.progress()
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite().all() & self._finite  # stays on the device: no wait
        return loss

    def pass_without_effect(self, batch: Any) -> None:
        """A forward and a backward pass, of which gradients alone are left. Ranks: all (collective
        where passes are)."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        told = {name: copy.deepcopy(getattr(self, name)) for name in names}
        self.current_gradient_accumulation_steps = 1  # the loop sets it before every step
        super().training_step(self.model_wrapped, batch)
        for name, value in told.items():
            setattr(self, name, value)


def _name(path: Path | None) -> str:
    return path.name if path else "the beginning"

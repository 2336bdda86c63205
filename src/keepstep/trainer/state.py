"""What a checkpoint consists of: taken from the Trainer, stored through a `Part`.

Standard files under standard names: weights, configuration and tokenizer in Hugging Face layout,
DeepSpeed's shards (or torch's optimizer.pt), scheduler, scaler, RNG and trainer_state.json.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState

from keepstep.ranks import collectives
from keepstep.recipe.config import ConfigError, Problem
from keepstep.run_folder.files import BLOCK
from keepstep.save.failure import SaveError
from keepstep.save.rank_part import Part, Piece, Rehearsal
from keepstep.save.safetensors_format import layout_of
from keepstep.sharding.deepspeed_engine import SnapshotCheckpointEngine, save_shards
from keepstep.sharding.flat_buffers import LayoutError, groups, is_stage3, masters
from keepstep.sharding.hf_weights import CARD, Probe, WeightsFile, ask, captured, trained
from keepstep.sharding.overflow import gather_after_overflow
from keepstep.sharding.sources import LAYOUT_FILE, NAMES_FILE, ReshardError
from keepstep.trainer.protocol import CheckpointedTrainer

logger = logging.getLogger(__name__)


LAZY_OPTIMIZERS = ("Adam", "AdamW", "SGD", "DeepSpeedCPUAdam", "FusedAdam")
LAZY_ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
SLACK = 8 << 20  # buffers, schedulers, counters


class Contents:
    """What a trainer's checkpoints consist of.

    Attributes:
        engine_writer: what DeepSpeed saves and loads through, None without it.
        gathering: the part that is being stored while the weights have to be gathered, else None.
    """

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer
        self.engine_writer: SnapshotCheckpointEngine | None = None
        self.gathering: Part | None = None
        self._weights: WeightsFile | None = None
        self._gathers = False
        self._companions: dict[str, bytes] | None = None

    @property
    def engine(self) -> Any:
        """DeepSpeed's that shards; None without, and at stage 0: there all is stored as DDP's."""
        return self.trainer.deepspeed if self.trainer.args.zero_stage else None

    def attach(self) -> None:
        """Once the engine is there, before it loads anything: it saves and loads through us."""
        if self.engine is not None:
            self.engine_writer = SnapshotCheckpointEngine(self.engine)
            self.engine.checkpoint_engine = self.engine_writer
            if is_stage3(self.engine):
                gather_after_overflow(self.engine.optimizer)

    def store(self, part: Part) -> None:
        """Take this rank's share of the checkpoint. Ranks: all (collective)."""
        folder = str(part.folder)
        self._write_weights(part, folder)
        if not self.trainer.args.save_only_model:
            self._write_state(part)
        part.attempt(lambda: self._write_rng_state(part))
        if part.rank == 0:
            part.attempt(lambda: part.write("trainer_state.json", self._state_json()))

    def rehearse(self) -> None:
        """Before the first step: all that a save does, but for tensors and the disk of the run.

        Ranks: all (collective).

        Raises:
            ConfigError: the model or its tokenizer cannot be stored.
            SaveError: on every rank: a save would fail.
        """
        self.plan()
        state = self.trainer.state
        before = copy.deepcopy(state.stateful_callbacks)
        with tempfile.TemporaryDirectory(prefix="keepstep-") as folder:
            part = Rehearsal(Path(folder), collectives.rank())
            self.store(part)
        part.attempt(lambda: self.trainer.describe().to_json())
        state.stateful_callbacks = before
        causes = list(collectives.gather_some(part.report.error).values())
        if causes:
            raise SaveError("no checkpoint of this run could be saved", causes) from part.error

    def _write_weights(self, part: Part, folder: str) -> None:
        """In Hugging Face layout: every rank its slices. Ranks: all (collective)."""
        assert self._companions is not None
        weights, wanted = self._weights, self.trainer.stores_weights()
        if weights is not None and wanted and not self._gathers:
            part.attempt(lambda: weights.store(part, self._pieces(weights)))
        elif self._gathers and wanted and not isinstance(part, Rehearsal):
            self.gathering = part
            try:
                self.trainer.save_model(folder, _internal_call=True)  # gathers, then _save
            finally:
                self.gathering = None
        if part.rank == 0:
            for name, content in self._companions.items():
                part.write(name, content)

    def store_gathered(self, state_dict: dict[str, Any]) -> None:
        """The gathered weights, written by `save_pretrained`. The main process."""
        part, storage = self.gathering, self.trainer.manager.storage
        assert part is not None

        def write() -> None:
            storage.make_folder(part.folder)
            try:
                self.trainer.model.save_pretrained(part.folder, state_dict=state_dict)
                storage.remove(part.folder / CARD)
            except SafetensorError as error:  # names no number, and has removed what it wrote
                if storage.free(part.folder) < sum(t.nbytes for t in state_dict.values()):
                    full = errno.ENOSPC
                    raise OSError(full, os.strerror(full), str(part.folder)) from error
                raise

        part.attempt(write)

    def plan(self) -> None:
        """Once: how the weights are stored, without gathering if that can be. Ranks: all.

        Raises:
            ConfigError: transformers refuses to store the model's configuration, or its tokenizer.
        """
        if self._companions is not None:
            return
        self._keep_generation_config()

        def look() -> tuple[dict[str, bytes], Probe | LayoutError]:
            model = self.trainer.model
            tokenizer = tokenizer_of(self.trainer)
            companions = {} if tokenizer is None else _stored("tokenizer", tokenizer)
            for what, configuration in _configurations(model):
                _stored(what, configuration)
            try:
                return companions, ask(model)
            except LayoutError as error:
                return companions, error

        companions, probe = collectives.on_main("asking for the weights", look)
        reason = None
        if self._is_apart and self.engine is not None and is_stage3(self.engine):
            self._gather("node_local: no machine's disk has a part of every rank")
        try:
            if isinstance(probe, LayoutError):
                raise probe
            self._weights = WeightsFile(self.trainer.model, probe)
            self._pieces(self._weights)
        except LayoutError as error:
            reason = str(error)
        reasons = collectives.gather_some(reason)
        self._companions = companions
        if reasons:
            self._weights = None
            self._gather(reasons[min(reasons)])
            return
        assert self._weights is not None
        self._companions |= self._weights.companions
        if self.engine is not None:
            self._companions[LAYOUT_FILE] = layout_of(self._weights.entries, self._weights.names)

    def _gather(self, why: str) -> None:
        """Have saves gather the weights on one rank. Ranks: all."""
        self._gathers = True
        if self.engine is not None:  # whatever the config says: it is the one way to store them
            self.engine._config.zero_config.gather_16bit_weights_on_model_save = True
        if collectives.is_main():
            logger.warning("every save gathers the weights on one rank: %s", why)

    def _keep_generation_config(self) -> None:
        """Have generation_config.json stored as it came, whatever transformers thinks of it.

        Published ones set sampling values without do_sample. transformers (5.23) stores such a file
        as long as it is what was loaded; but the Trainer gives it the tokenizer's special tokens.
        """
        config = getattr(self.trainer.model, "generation_config", None)
        if config is None:
            return
        try:
            config.validate(strict=True)
        except ValueError as error:
            config._original_object_hash = hash(config)
            if collectives.is_main():
                told = " ".join(str(error).split())
                logger.warning(
                    "generation_config.json is stored as it came. transformers: %s", told
                )

    def _pieces(self, weights: WeightsFile) -> list[Piece]:
        world_size = self.trainer.args.world_size
        # Each machine's own disk: all of it from the main process, which has it in 16 bits.
        engine = None if self._is_apart and not self._gathers else self.engine
        return weights.pieces(self.trainer.model, engine, collectives.rank(), world_size)

    @property
    def _is_apart(self) -> bool:
        """Whether each machine writes to a disk of its own."""
        return self.trainer.manager.saver.parts is not None

    def _write_rng_state(self, part: Part) -> None:
        for name, content in captured(self.trainer._save_rng_state).items():
            part.write(name, content)

    def _write_state(self, part: Part) -> None:
        """Optimizer, scheduler and loss scaler. Ranks: all (collective)."""
        main, trainer = part.rank == 0, self.trainer
        if self.engine is not None:
            self._write_engine(part, self.engine)
        elif main:
            part.attempt(lambda: part.save("optimizer.pt", trainer.optimizer.state_dict(), True))
            part.write(NAMES_FILE, json.dumps(self.group_names()).encode())
        if main:
            part.attempt(lambda: part.save("scheduler.pt", trainer.lr_scheduler.state_dict()))
        scaler = trainer.accelerator.scaler
        if main and scaler is not None:
            part.attempt(lambda: part.save("scaler.pt", scaler.state_dict()))

    def _write_engine(self, part: Part, engine: Any) -> None:
        """DeepSpeed's shards: every rank its own, and the module's from rank 0."""
        if isinstance(part, Rehearsal) and engine.zero_nvme_offload_optimizer():
            return  # DeepSpeed copies files of the size of the optimizer
        copy_script, engine._copy_recovery_script = engine._copy_recovery_script, lambda path: None
        writer = self.engine_writer
        assert writer is not None
        writer.part = part
        adapter = isinstance(self.trainer.model, PeftModel)
        if engine.zero_load_from_fp32_weights():
            writer.derivable = {parameter.data_ptr() for parameter in trained(engine)}
            if adapter and not is_stage3(engine):  # DeepSpeed leaves them out, but for tied ones
                frozen = (p for p in self.trainer.model.parameters() if not p.requires_grad)
                writer.derivable |= {parameter.data_ptr() for parameter in frozen}
        tag = f"global_step{self.trainer.state.global_step}"
        try:
            save_shards(engine, str(part.folder), tag, exclude_frozen_parameters=adapter)
        finally:
            writer.part = None
            engine._copy_recovery_script = copy_script
        if part.rank == 0:
            part.write("latest", tag.encode())  # where DeepSpeed looks for the tag

    def _state_json(self) -> bytes:
        """trainer_state.json, as Trainer writes it: callbacks that have a state are in it."""
        states: dict[str, list[Any]] = {}
        for callback in [*self.trainer.callback_handler.callbacks, self.trainer.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.trainer.state.stateful_callbacks = {
            name: of_kind if len(of_kind) > 1 else of_kind[0] for name, of_kind in states.items()
        }
        return json.dumps(vars(self.trainer.state), indent=2, sort_keys=True).encode() + b"\n"

    def group_names(self) -> list[list[str]]:
        """Names of the trained parameters, group by group, as the Trainer has built them."""
        names = {parameter: name for name, parameter in self.trainer.model.named_parameters()}
        if self.engine is None:
            optimizer = self.trainer.optimizer
            return [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        zero = self.engine.optimizer
        if not is_stage3(self.engine):
            return [[names[p] for p in group] for group in zero.bit16_groups]
        merged: dict[int, list[str]] = {}
        for i, group in enumerate(groups(self.engine)):
            merged.setdefault(zero.sub_group_to_group_id[i], []).extend(names[p] for p in group)
        return [merged[number] for number in sorted(merged)]

    def stored_names(self) -> dict[str, str]:
        """Of the weights file, after `plan()`: name there → name in the model.

        Raises:
            ReshardError: it stores the weights under other shapes than the model has.
        """
        if self._weights is None:
            raise ReshardError("the weights are not stored as the model has them in memory")
        return self._weights.names

    def snapshot_bytes(self) -> int:
        """What this rank copies of a checkpoint, at most: for each trained element its master and
        two moments, as Adam has them. What should not fit after all is copied slower."""
        parameters = list(self.trainer.model.parameters())
        changing = [p for p in parameters if p.requires_grad]
        frozen = [] if isinstance(self.trainer.model, PeftModel) else parameters
        frozen = [getattr(p, "ds_tensor", p) for p in frozen if not p.requires_grad]
        if self.engine is not None:
            with contextlib.suppress(LayoutError):
                changing = masters(self.engine)
        elif not collectives.is_main():
            changing, frozen = [], []
        sizes = [3 * t.nbytes for t in changing] + [t.nbytes for t in frozen]
        return sum(sizes) + 3 * len(sizes) * BLOCK + SLACK

    def may_be_lazy(self) -> bool:
        """Whether only the optimizer's step, which our hook precedes, changes what is copied.

        Not known of others: schedule-free ones change weights between evaluation and training,
        layer-wise ones step in the backward pass, partly offloaded ones in two places.
        """
        known = type(self.optimizer()).__name__ in LAZY_OPTIMIZERS
        if self.engine is None:
            return known
        sharded = type(self.engine.optimizer).__name__ in LAZY_ZERO
        whole = getattr(self.engine.optimizer, "partial_offload", 1.0) in (1.0, None)
        return known and sharded and whole and not getattr(self.engine, "zenflow", False)

    def optimizer(self) -> torch.optim.Optimizer | None:
        """torch's own, inside of Accelerate's and DeepSpeed's wrappers."""
        optimizer = self.trainer.optimizer
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = getattr(optimizer, "optimizer", None)
            if optimizer is None:
                return None
        return optimizer

    def steps_made(self) -> float | None:
        """The optimizer's own count of its steps; None: it has none, or keeps none. Ranks: any."""
        optimizer = self.optimizer()
        if optimizer is None:
            return None
        kept = [*optimizer.state.values(), *optimizer.param_groups]
        counts = [float(values["step"]) for values in kept if "step" in values]
        return max(counts, default=0.0 if not optimizer.state else None)


def tokenizer_of(trainer: Any) -> Any:
    """What is stored beside the weights, as Trainer chooses it: the tokenizer (or processor) that
    it was given, or its collator's; None: there is none."""
    if trainer.processing_class is not None:
        return trainer.processing_class
    return getattr(trainer.data_collator, "tokenizer", None)


def _configurations(model: Any) -> Iterator[tuple[str, Any]]:
    """What is stored beside the weights: its name, and what has a `save_pretrained`."""
    if isinstance(model, PeftModel):
        yield from model.peft_config.items()
        return
    yield "configuration", model.config
    if model.can_generate() and model.generation_config is not None:
        yield "generation configuration", model.generation_config


def _stored(what: str, thing: Any) -> dict[str, bytes]:
    """The files of `thing`.

    Raises:
        ConfigError: its library refuses to store it.
    """
    try:
        return captured(thing.save_pretrained)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        problem = Problem(
            f"no checkpoint can be stored with the model's {what}: {error}",
            "mend its file in a copy of the model, and name that: model_name_or_path",
            "unsavable",
        )
        raise ConfigError([problem]) from error

"""One attempt: a launch of a run, from its claim to the run folder to how it ended."""

from __future__ import annotations

import atexit
import contextlib
import socket
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from keepstep.output import streams
from keepstep.output.said import finish_lines, keep_lines
from keepstep.policy.selection import Choice, NoProgressError, SelectionError, UnreadableError
from keepstep.policy.standstill import Standstills
from keepstep.preflight.agreement import agree
from keepstep.preflight.probes import probe
from keepstep.ranks import collectives, signals
from keepstep.ranks.console import say, say_everywhere
from keepstep.ranks.listener import is_of_main
from keepstep.ranks.outcome import (
    CONFIG_EXIT_STATUS,
    Outcome,
    ended,
    tell_shell_of_beginning,
)
from keepstep.ranks.watchdog import Watchdog
from keepstep.recipe.config import Recipe
from keepstep.recipe.problems import ConfigError
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.said import Said
from keepstep.save.manager import CheckpointManager
from keepstep.save.resume_checks import DriftError, Resume
from keepstep.sharding.sources import ReshardError
from keepstep.trainer import about
from keepstep.trainer.farewell import farewell
from keepstep.trainer.health import RewindError, SpoiltError
from keepstep.trainer.launched import launched
from keepstep.trainer.mirror_callback import Mirrored
from keepstep.trainer.notify import Notifier
from keepstep.trainer.publish_callback import Publishing
from keepstep.trainer.stops import StoppedError, stop_if_asked

LAST_WORDS_SECONDS = 5.0  # until what was said at the end is written down


class CurrentAttempt:
    """What one launch of a run has: its owner, what it carries on from, its watchdog, its end.

    Used as a context manager: the watchdog watches within, and however the block is left, the run
    folder says so. In this order:

    1. `check()` (all ranks): may it publish, is the run folder seen by all, is there room?
    2. `with attempt:` (all ranks): the watchdog begins; signals are heard.
    3. `begin()` (all ranks): the main process claims the run.
    4. `choose()` (all ranks): what to carry on from; the main process decides.
    5. The trainer trains, and sets `outcome` (all ranks).
    6. At the block's end the main process publishes, and writes down how the attempt ended.

    Attributes:
        recipe: the run, as it is asked for.
        manager: its checkpoints.
        checkpoint, choice: what it carries on from, and why; None before `choose()`.
        settings: what a resume compares; empty before `choose()`.
        weights_taken: the model was built with the weights of `checkpoint` (weights alone).
        trained_to: the step at which training was left; None: no step is known to be made.
        outcome: how it ended; None before.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Nothing is changed or claimed yet. Ranks: all."""
        self.recipe = recipe
        training = recipe.training
        self.manager = CheckpointManager(
            str(training.output_dir),
            training.policy(),
            mode=training.save_mode,
            timeout=training.save_timeout_seconds,
            min_free=training.min_free,
        )
        self.hub = Publishing(recipe)
        self.mirror = Mirrored(recipe)
        self.notifier = Notifier(self.manager.run)
        self.manager.heard = self.notifier.hear
        standstills = Standstills(training.hang_min_seconds, training.hang_timeout_seconds)
        self.watchdog = Watchdog(training.peer_timeout_seconds, standstills, self._give_up)
        self.checkpoint: Checkpoint | None = None
        self.choice: Choice | None = None
        self.settings: dict[str, Any] = {}
        self.weights_taken = False
        self.trained_to: int | None = None
        self.outcome: Outcome | None = None
        self.is_open = self._begun = False
        self._said: Said | None = None
        self._signals = contextlib.ExitStack()

    def check(self) -> None:
        """What only a look at these machines and at the Hub tells. Ranks: all (collective).

        Raises:
            ConfigError: on every rank: the run could not be saved, or not published.
        """
        asked = collectives.on_all("asking the Hub", self.hub.check)
        agree([*asked, *probe(self.recipe), *self.notifier.check()])

    def __enter__(self) -> Self:
        self._signals.enter_context(signals.heard())
        self.is_open = True
        self.watchdog.start()
        return self

    def begin(self) -> None:
        """Claim the run, unless somebody has asked for a stop. Ranks: all (collective).

        Raises:
            NotOwnerError: another attempt has the run.
            StoppedError: on every rank, when one of them has received a signal.
        """
        if self._begun:
            return
        self._begun = True
        tell_shell_of_beginning()
        self.mirror.look()
        apart = self.recipe.training.node_local
        try:
            self.manager.start(self.mirror, self.mirror.nodes if apart else None)
        except NotOwnerError:
            stop_if_asked()  # while it waited for the owner's end
            raise
        hosts = collectives.gather(socket.gethostname())
        self._keep_what_is_said(hosts)
        collectives.on_main("writing down what is launched", lambda: self._keep_launched(hosts))
        self._signals.callback(signals.tell_at_once(self.manager.stop_asked))
        stop_if_asked()

    def _keep_what_is_said(self, hosts: list[str]) -> None:
        """From here on, and what was said until now. Ranks: all; each for itself."""
        rank = collectives.rank()
        streams.protect()
        node = list(dict.fromkeys(hosts)).index(hosts[rank])
        self._said = Said(self.manager.run, self.manager.attempt, node, rank)
        keep_lines(self._said.keep)
        atexit.register(self._end_of_words)

    def _end_of_words(self) -> None:
        finish_lines()
        if self._said is not None:
            self._said.drain(LAST_WORDS_SECONDS)

    def _keep_launched(self, hosts: list[str]) -> None:
        self.manager.writer.keep_launched(launched(self.recipe, self.manager.attempt, hosts))

    def choose(self, settings: Mapping[str, Any], request: str | None = None) -> None:
        """Decide what to carry on from. Ranks: all (collective).

        Args:
            settings: what determines the trajectory, to be compared with the checkpoint's.
            request: in the place of the recipe's `resume_from_checkpoint`.

        Raises:
            SelectionError, DriftError, UnreadableError: see `CheckpointManager.choose`.
        """
        self.settings = dict(settings)
        resume = resume_of(self.recipe, self.settings)
        if request is not None:
            resume = replace(resume, request=request)
        self.checkpoint, self.choice = self.manager.choose(resume)
        suspect = self.watchdog.standstills.suspect = self.manager.suspect
        if suspect is not None:
            say(
                f"at step {suspect} an earlier attempt was stuck, by learnt time: until that step "
                "is passed, hang_timeout_seconds alone counts"
            )

    @property
    def start(self) -> Checkpoint | None:
        """The checkpoint whose whole state training goes on with; None for the beginning."""
        weights_only = self.choice is not None and self.choice.weights_only
        return None if weights_only else self.checkpoint

    def facts(self) -> dict[str, Any]:
        """What the model card says of the run. Ranks: all (collective)."""
        return collectives.on_main(
            "describing the run", lambda: about.describe(self.recipe, self.hub.license)
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or isinstance(error, StoppedError):
                self._end_well(error)
            else:
                self._end_in(error)
        finally:
            self.notifier.close()
            self.is_open = False
            self._signals.close()

    def _end_well(self, stop: StoppedError | None) -> None:
        if stop is not None:
            self.outcome = ended("preempted", reason=f"{stop}, before training began")
        assert self.outcome is not None  # the trainer has set it
        self.watchdog.stop()
        # The main process alone: the others do not wait.
        self.outcome = self.mirror.finish(self.outcome, self.manager)
        self.outcome = self.hub.finish(self.outcome, self.manager)
        self.manager.end(self.outcome)
        farewell(self.manager, self.outcome)

    def _end_in(self, error: BaseException) -> None:
        """Write down what ended the attempt; the error goes on."""
        if isinstance(error, NoProgressError):
            self.outcome = ended("no_progress", reason=str(error))
        elif isinstance(error, (NotOwnerError, UnreadableError)):
            # Nothing is written any more; or nothing can be read, which a later launch may find
            # otherwise.
            self.outcome = ended("failed", reason=str(error))
        elif isinstance(error, (ConfigError, SelectionError, DriftError, ReshardError)):
            self.outcome = Outcome("failed", str(error), exit=CONFIG_EXIT_STATUS)
        elif isinstance(error, RewindError) and error.asked:  # nobody is to launch it by himself
            self.outcome = ended("preempted", reason=f"{error.asked}; {error}")
        elif isinstance(error, RewindError):
            self.outcome = ended("rewound", reason=str(error), global_step=self.trained_to)
        elif isinstance(error, SpoiltError):  # the same rows would do the same again
            step = self.trained_to
            self.outcome = Outcome("failed", str(error), step, exit=CONFIG_EXIT_STATUS)
        elif isinstance(error, Exception):
            reason = self.watchdog.explain(error)
            self.outcome = ended("failed", reason=reason, global_step=self.trained_to)
        else:
            self.outcome = ended("failed", reason=type(error).__name__, global_step=self.trained_to)
        # Other ranks may wait for this one: they hear why, or miss it.
        self.watchdog.stop(missed=isinstance(error, ConfigError))
        self.hub.close()
        self.mirror.close()
        self.manager.end(self.outcome)
        if isinstance(error, (NoProgressError, NotOwnerError, UnreadableError, SpoiltError)):
            farewell(self.manager, self.outcome)

    def _give_up(self, reason: str) -> None:
        """Another rank is dead or stuck: the watchdog ends this one."""
        say_everywhere(f"keepstep: {reason}. This rank ends.")
        bound, step = self.watchdog.hang, self.watchdog.standstills.step
        if bound is not None and bound.is_learnt:
            self.manager.record_hang(step, bound)
        self.notifier.notices.rank_lost = True
        self.manager.end(ended("failed", reason=reason, global_step=step or None))
        if not collectives.is_main() and is_of_main(reason):
            self.notifier.tell_of_main(reason, self.manager, step or None)
        self.notifier.close()
        self._end_of_words()  # no other end follows


def resume_of(recipe: Recipe, settings: Mapping[str, Any]) -> Resume:
    """How the recipe wants to resume."""
    training = recipe.training
    return Resume(
        request=str(training.resume_from_checkpoint),
        settings=settings,
        allow_drift=training.allow_drift,
        verify=training.verify_on_resume,
        patience=training.max_attempts_without_progress,
        weights_only=training.resume_weights_only,
        batch=training.batch,
        allow_batch_change=training.allow_batch_change,
        parallel_layout=training.parallel_layout,
        rigid=training.rigid,
        recipe=recipe.fingerprint(),
    )

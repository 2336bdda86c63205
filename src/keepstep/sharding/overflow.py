"""After a gradient that is not finite DeepSpeed's stage 3 goes on as after any other step."""

from __future__ import annotations

from typing import Any


def gather_after_overflow(optimizer: Any) -> None:
    """Have stage 3 fetch small parameters again after a step that it skips, as after one it makes.

    It skips a step whose gradient is not finite, with any precision, and leaves out that it keeps
    small parameters whole (deepspeed 0.19.8, stage3.py: `_post_step`). Where one is used outside of
    its module, as TRL uses the head, the next pass ends in "tracing error", before anybody has
    heard what was wrong.

    Ranks: all; what is fetched is so on all (collective): they skip the same steps.
    """
    clean_up = optimizer._overflow_clean_up

    def clean_up_and_gather(*args: Any, **kwargs: Any) -> None:
        clean_up(*args, **kwargs)
        optimizer.checkpoint_event_epilogue()  # which does this, and nothing else

    optimizer._overflow_clean_up = clean_up_and_gather

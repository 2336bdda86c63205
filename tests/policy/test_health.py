from __future__ import annotations

from keepstep.policy.health import Offence, goes_back, stopped
from keepstep.policy.spikes import Spike


def test_what_is_said() -> None:
    of_a_rank = Offence(7, "loss", (1,), (3, 9), {1: "nan"})
    told = stopped(of_a_rank, 6).splitlines()
    assert told[0] == (
        "the loss of rank 1 is not finite (nan) in step 7; it had these rows of the training set, "
        "counted from 0: 3, 9"
    )
    assert "checkpoint-6 is from before" in told[1]
    assert "Hint: look at these rows, lower learning_rate" in told[2]
    assert "nothing was saved before" in stopped(of_a_rank, None)
    of_two = Offence(7, "loss", (0, 2), (), {0: "nan", 2: "inf"})
    assert str(of_two) == "the loss of ranks 0, 2 is not finite (inf, nan) in step 7"
    assert "Hint: lower learning_rate" in stopped(of_two, 6), "of a stream no rows are known"
    assert str(Offence(7, "weights")) == "the weights are not finite after step 7"


def test_what_is_said_of_a_spike_and_of_going_back() -> None:
    spike = Offence(7, "loss", rows=(3, 9), spike=Spike("loss", 9.25, 2.5, 2.0))
    assert str(spike) == (
        "the loss is a spike (9.25, above 2.5; the mean was 2) in step 7; it had these rows of the "
        "training set, counted from 0: 3, 9"
    )
    assert "on_spike: rewind (2 of 3): the next attempt goes on from checkpoint-6, and leaves" in (
        goes_back(spike, 6, 2, 3)
    )
    assert "goes on from the beginning" in goes_back(spike, 0, 1, 3)
    told = stopped(spike, 6, "max_rewinds: 0")
    assert "It does not go back (on_spike: rewind): max_rewinds: 0" in told
    assert "on_spike: ignore goes on all the same" in told

"""What machines are called in messages."""

from keepstep.ranks.nodes import told_apart


def test_machines_of_one_name_have_their_numbers() -> None:
    assert told_apart(["a", "b"]) == ("a", "b")
    assert told_apart(["pod", "b", "pod"]) == ("pod (machine 0)", "b", "pod (machine 2)")

"""A folder that has one machine's parts of checkpoints: valid, and nothing to go on from alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME
from keepstep.policy.node_parts import together
from keepstep.policy.retention import Policy
from keepstep.policy.selection import UnreadableError, choose
from keepstep.run_folder.parts import held_in, part_of, whole_of
from keepstep.run_folder.place import Place, tell_place
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import STATE, commit, identify


@pytest.fixture
def machines(tmp_path: Path) -> list[RunFolder]:
    """Two, each with its part of two checkpoints; the first one has an older one whole."""
    runs = []
    for node in (0, 1):
        folder = identify(tmp_path / str(node), metric="eval_loss")
        for step in (4, 8):
            commit(folder, step, STATE)
            whole = RunFolder(folder).checkpoint(step)
            own = {name for name, entry in whole.manifest.files.items() if entry.rank == node}
            part, content = part_of(whole.manifest, own)
            for name in whole.manifest.files.keys() - own:
                (whole.path / name).unlink()
            (whole.path / WHOLE_NAME).write_bytes(content)
            (whole.path / MANIFEST_NAME).write_text(part.to_json())
        runs.append(RunFolder(folder))
    commit(runs[0].path, 2, STATE)
    return runs


def test_what_machines_have_together(machines: list[RunFolder]) -> None:
    """All three; with a file lost, or another branch's on one of them, not that one."""
    held = dict(enumerate(map(held_in, machines)))
    found = together(held)
    assert sorted(found) == [2, 4, 8]
    assert set(found[8]) == set(whole_of(machines[1].checkpoint(8)).manifest.files)
    assert found[8]["rng_state_1.pth"] == 1
    assert sorted(together({0: held[0]})) == [2]
    (machines[1].path / f"checkpoint-8/{WHOLE_NAME}").write_text("{")
    assert sorted(together(dict(enumerate(map(held_in, machines))))) == [2, 4]


def test_a_part_is_valid_by_itself(machines: list[RunFolder]) -> None:
    part = machines[1].checkpoint(8)
    assert part.faults(deep=True) == []
    (part.path / "rng_state_1.pth").write_bytes(b"x")
    assert part.faults(deep=True)


def test_it_is_not_gone_on_from_alone(machines: list[RunFolder]) -> None:
    """Nor does the run begin anew: the other machines may have the rest."""
    assert machines[0].choose("auto").step == 2
    with pytest.raises(UnreadableError, match="this machine has its part of it alone"):
        machines[1].choose("auto")

    def faults(step: int) -> list[str]:
        return []

    asked = machines[1].situation("auto", Policy(), faults, 3, takeable={4})
    assert choose("auto", asked).step == 4
    none = machines[1].situation("auto", Policy(), faults, 3, takeable=())
    assert choose("auto", none).step is None


def test_what_the_commands_say(machines: list[RunFolder]) -> None:
    here = str(machines[1].path)
    assert "valid part" in CliRunner().invoke(app, ["ls", here]).stdout
    verified = CliRunner().invoke(app, ["verify", "--deep", here])
    assert verified.exit_code == 0
    assert "checkpoint-8: valid part (3 files, " in verified.stdout
    which = CliRunner().invoke(app, ["which", here, "auto"])
    assert which.exit_code == 1
    assert "on all the machines" in " ".join(which.stdout.split())


def test_where_the_rest_is(machines: list[RunFolder], tmp_path: Path) -> None:
    """As the newest attempt wrote it down on each machine."""
    mirror = (tmp_path / "mirror").as_uri() + "/run"
    (tmp_path / "mirror").mkdir()
    for node, run in enumerate(machines):
        run.place.write_bytes(Place(f"n{node}", "n0", mirror).as_text())
    here = str(machines[1].path)
    told = f"the run's log is on n0; whole checkpoints: keepstep ls {mirror}"
    for command in (["ls", here], ["verify", here], ["which", here], ["log", here]):
        said = " ".join(CliRunner().invoke(app, command).stdout.split())
        assert f"This is the part of the run on n1 (node_local), {told}" in said, command
    assert "with the run's log" in tell_place(machines[0])
    refused = CliRunner().invoke(app, ["which", here, "8"])
    assert f"{mirror}/checkpoint-8" in "".join(refused.stdout.split())
    export = ["export", f"{here}/checkpoint-8", "--to", str(tmp_path / "model")]
    refused = CliRunner().invoke(app, export)
    assert refused.exit_code == 2
    assert "here is the part of it on n1 (node_local)" in refused.output
    assert f"Hint: keepstep export {mirror}/checkpoint-8 --to DIR" in refused.output
    synced = CliRunner().invoke(app, ["sync", here])
    assert synced.exit_code == 1, "its mirror is known"
    assert "checkpoint-8: not sent: this machine has a part" in synced.output
    machines[1].place.write_text("{")
    assert tell_place(machines[1]) == "This is one machine's part of the run (node_local)"
    bare = CliRunner().invoke(app, export)
    assert "Hint: keepstep export MIRROR/RUN/checkpoint-8 --to DIR" in bare.output

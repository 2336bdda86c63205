"""One is told as one: what counts in a message goes through `counted`, or says why it need not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.output.units import be, counted

ROOT = Path(__file__).parents[2]
THINGS = (
    "attempts|bytes|checkpoints|days|files|folders|hours|kills|lines|machines|minutes|nodes|objects|"
    "parts|points|problems|processes|ranks|rows|runs|saves|shards|steps|tensors|times|tokens"
)
COUNTS = re.compile(rf" (?:of them )?({THINGS})\b")
# Of which there are two or more where that is said; a name in the place of a number; what no person
# reads as prose (fingerprints, programs' errors); and slurm/, whose Python has no keepstep.
FREE = {
    "cli/agreement.py": {"len(group) machines"},
    "cli/check.py": {"what rows", "step.length tokens"},
    "cli/preview.py": {"lengths[-1] tokens"},
    "cli/status.py": {"found.tokens_per_second tokens"},
    "cli/tables.py": {"mtbf_hours hours"},
    "cli/together.py": {"len(more) machines", "own processes"},
    "data/dataset.py": {"len(rows) rows", "len(first) rows"},
    "data/images.py": {"what rows"},
    "data/mixture.py": {"taken / rows times"},
    "data/taken.py": {"what rows"},
    "data/tokenize.py": {"what rows", "longest tokens"},
    "mirror/answers.py": {"int(tries[1]) + 1 times"},
    "mirror/mirroring.py": {"failures times"},
    "policy/completeness.py": {"sizes[name] bytes"},
    "policy/manifest.py": {"entry.bytes bytes"},
    "policy/next_step.py": {"seen.fruitless attempts"},
    "policy/notices.py": {"seconds / 60 minutes"},
    "policy/retention.py": {"policy.every_n_steps steps"},
    "preflight/health.py": {"WINDOWS[1] steps"},
    "preflight/validate.py": {"training.world_size processes"},
    "publish/card.py": {"settings.get('max_length') tokens"},
    "recipe/model.py": {"len(vocabulary) tokens"},
    "recipe/parse.py": {"len(paths) times"},
    "recipe/problems.py": {"len(self.problems) problems"},
    "run_folder/safe_read.py": {"limit bytes"},
    "save/snapshot_memory.py": {"like.nbytes bytes"},
    "trainer/given.py": {"len(rows) rows", "len(names) tensors"},
    "trainer/row_plan.py": {"start.global_step steps", "place.drawn rows"},
    "trainer/saving.py": {"count saves"},
    "trainer/sft.py": {"self.args.sequence_size processes"},
}


def counts(file: Path) -> Iterator[str]:
    """What is counted in its f-strings, without `counted`; not the whole of which something is a
    part (`1 of 5 steps`), of which there are more than one."""
    for text in ast.walk(ast.parse(file.read_text())):
        if not isinstance(text, ast.JoinedStr):
            continue
        values = text.values
        for before, value, after in zip([None, *values], values, [*values[1:], None], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            found = COUNTS.match(str(after.value))
            told = str(before.value) if isinstance(before, ast.Constant) else ""
            if found and not re.search(r"\bof $", told):
                yield f"{ast.unparse(value.value)} {found.group(1)}"


def test_one_is_told_as_one() -> None:
    rooms = ROOT / "src/keepstep"
    found = {file.relative_to(rooms).as_posix(): {*counts(file)} for file in rooms.rglob("*.py")}
    assert {name: told for name, told in found.items() if told} == FREE


@pytest.mark.parametrize(
    ("count", "what", "told"),
    [
        (1, "step", "1 step"),
        (0, "step", "0 steps"),
        (2000, "row", "2,000 rows"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
    ],
)
def test_counted(count: int, what: str, told: str) -> None:
    assert counted(count, what) == told
    assert be(count) == ("is" if count == 1 else "are")

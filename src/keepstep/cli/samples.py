"""`keepstep samples`: what the model has answered to the prompts of its recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from keepstep.cli.common import JsonOption, RunArgument, app, console, examples, fail, used_run
from keepstep.cli.rows import JsonObject
from keepstep.output.printable import first_few
from keepstep.policy.samples import Sample
from keepstep.run_folder.launched import launched_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import OddFileError


@dataclass(frozen=True)
class SampleRow(JsonObject):
    """A completion.

    Attributes:
        step: the optimizer steps that the model had made.
        number: of the prompt in its file, from 1.
        prompt: what the model was asked.
        completion: what it wrote.
        reference: what that is compared with; null: nothing.
        matches: whether it is the reference, but for space around it; null: there is none.
    """

    step: int
    number: int
    prompt: str
    completion: str
    reference: str | None
    matches: bool | None

    @staticmethod
    def of(sample: Sample) -> SampleRow:
        matches = None if sample.reference is None else sample.matches
        texts = sample.prompt, sample.completion, sample.reference
        return SampleRow(sample.step, sample.number, *texts, matches)


@app.command(epilog=examples("keepstep samples runs/mine", "keepstep samples runs/mine --number 1"))
def samples(
    run: RunArgument,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="The evaluation of this step.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--number", min=1, help="This prompt, at every step that was evaluated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the model answered to `sample_prompts`, at the newest evaluation or others."""
    try:
        folder = used_run(run)
        found = folder.samples()
    except (OSError, OddFileError) as error:
        fail(f"{run}: samples.jsonl cannot be read: {error}")
    if step is None and number is None and found:
        step = found[-1].step
    chosen = [s for s in found if step in (None, s.step) and number in (None, s.number)]
    if as_json:
        typer.echo(json.dumps([SampleRow.of(sample).as_dict() for sample in chosen], indent=1))
        raise typer.Exit(1 if found and not chosen else 0)
    if not chosen:
        if found:
            steps = first_few([str(one) for one in dict.fromkeys(s.step for s in found)])
            told = f"{run}: no completions of that step or prompt"
            fail(told, f"    Hint: there are some of the steps {steps}", status=1)
        console.tell(f"{run}: {_why_none(folder)}")
        return
    for sample in chosen:
        mark = "" if sample.reference is None else ", matches" if sample.matches else ", differs"
        console.tell_lines(f"step {sample.step}, prompt {sample.number}{mark}")
        for sign, text in (("<", sample.prompt), (">", sample.completion)):
            console.tell_lines("\n".join(f"{sign} {line}" for line in text.split("\n")))


def _why_none(run: RunFolder) -> str:
    """Why the model has answered nothing, as far as the newest launch tells."""
    launched = launched_of(run)
    recipe = launched[max(launched)].recipe if launched else {}
    asks = recipe.get("sample_prompts", True)
    return "no completions yet" if asks else "no completions: its recipe has no sample_prompts"

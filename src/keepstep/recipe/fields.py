"""Where a recipe's rows come from: its fields, each with its type, unit and one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DatasetMixtureConfig, ScriptArguments


@dataclass
class DataConfig(ScriptArguments, DatasetMixtureConfig):
    """Where the rows come from. TRL's fields (`dataset_name`, `datasets`, …), and four more."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "File, folder or Hub dataset to evaluate on, beside `dataset_name`."},
    )
    eval_datasets: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Several to evaluate on, by name: `{math: data/math.jsonl, code: owner/name}`. "
            "Each has metrics of its own: `eval_math_loss`, `eval_code_loss`, …"
        },
    )
    column_names: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "What a column is, where its name does not say so: `{prompt: question, "
            "completion: answer}`. Known: messages, prompt, completion, text, instruction, input, "
            "output, system, history, tools, input_ids, labels."
        },
    )
    mixture_stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "Of `datasets` whose parts have a `fraction`: `first_exhausted` takes no row "
            "twice, so the part with too few rows for its share decides how many there are in "
            "all; `all_exhausted` takes every row, and repeats those of parts with too few "
            "(oversampling). Of streams each row's part is drawn."
        },
    )
    eval_split_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the training rows (0 to 1) set aside for evaluation when no "
            "evaluation data is given; drawn with `data_seed`, else `seed`."
        },
    )

"""What libraries would refuse of a recipe once the model is loaded, asked of them before.

The schedule is built, of one number; nothing of the model is looked at.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available
from transformers.utils.chat_template_utils import _compile_jinja_template
from trl import SFTConfig

from keepstep.recipe.config import KeepstepConfig, Problem, Recipe
from keepstep.recipe.trajectory import word

TEMPLATES = (".jinja", ".j2")  # what TRL (1.16) reads as a template; else it names a tokenizer
FULL = 1024  # tokens: the default of TRL
STEPS = 1000  # of a run whose length is not known yet
STANDARD = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
# Without a package, and asked for otherwise than the others: not known to be missing.
NOT_LOOKED_FOR = ("azure_ml", "flyte")


def check_libraries(recipe: Recipe) -> Iterator[Problem]:
    """Every such problem. Ranks: any."""
    training = recipe.training
    yield from _packages(recipe)
    yield from _reports(training)
    yield from _optimizer(training)
    yield from _compiled(training)
    yield from _schedule(training)
    yield from _template(training)
    yield from _lengths(training)


def _lengths(training: KeepstepConfig) -> Iterator[Problem]:
    if not isinstance(training, SFTConfig):
        return
    if (training.packing or training.eval_packing) and training.max_length is None:
        yield Problem("packing needs a max_length", f"max_length: {FULL}", "field")


def _packages(recipe: Recipe) -> Iterator[Problem]:
    for name, asked, is_there, package in (
        (
            "use_liger_kernel",
            recipe.training.use_liger_kernel,
            is_liger_kernel_available(),
            "liger-kernel",
        ),
        *(
            (name, getattr(recipe.model, name), is_bitsandbytes_available(), "bitsandbytes")
            for name in ("load_in_4bit", "load_in_8bit")
        ),
    ):
        if asked and not is_there:
            yield _missing(f"{name}: {package}", package)


def _reports(training: KeepstepConfig) -> Iterator[Problem]:
    available = get_available_reporting_integrations()
    for name in training.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            yield Problem(f"report_to: {name} is none of: none, all, {known}", code="package")
        elif name == "comet_ml" and name not in available and find_spec(name):
            # So transformers (5.23) has it, offline, too.
            told = "report_to: comet_ml is installed, but has no API key, or is older than 3.43"
            yield Problem(
                told, "COMET_API_KEY, of any value where COMET_START_ONLINE=false", "package"
            )
        elif name not in (*available, *NOT_LOOKED_FOR):
            yield _missing(f"report_to: {name}", name.replace("_", "-"))


def _missing(what: str, package: str) -> Problem:
    return Problem(f"{what} is not installed", f"pip install {package}", "package")


def _optimizer(training: KeepstepConfig) -> Iterator[Problem]:
    if "optimizer" in training.deepspeed_settings:
        return  # DeepSpeed's own
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except AttributeError:
        return  # of the model, which is not there yet
    except (ImportError, ValueError, TypeError) as error:
        what = f"optim: {word(training.optim)}: {str(error).strip().splitlines()[0]}"
        yield Problem(what, "optim: adamw_torch", "optimizer")


def _compiled(training: KeepstepConfig) -> Iterator[Problem]:
    """What DeepSpeed (0.19.8) compiles where it is first used: cpu_adam where the optimizer is
    offloaded, fused_adam for an optimizer of its own configuration; no other, for ZeRO."""
    own = training.deepspeed_settings.get("optimizer") or {}
    adam = str(own.get("type", "")).lower() in ("adam", "adamw")
    tools = [os.environ.get("CXX") or "c++", "ninja"]
    if (device := training.offloaded("optimizer")) != "none":
        what, hint = f"offload_optimizer_device: {device}", "install it, or offload nothing"
    elif adam and not training.use_cpu and not (own.get("params") or {}).get("torch_adam"):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        tools.append("nvcc" if shutil.which("nvcc") else f"{home}/bin/nvcc")
        what = f"optimizer: {own['type']} of DeepSpeed's configuration"
        hint = 'leave it out (the recipe\'s is taken), or "torch_adam": true in its params'
    else:
        return
    for tool in tools:
        if shutil.which(tool) is None:
            told = f"{what}: DeepSpeed compiles it for this machine, which has no {tool}"
            # Compiled before, it is loaded without a compiler, but not without ninja.
            yield Problem(told, hint, "package", "error" if tool == "ninja" else "warning")


def _schedule(training: KeepstepConfig) -> Iterator[Problem]:
    if "scheduler" in training.deepspeed_settings or not training.learning_rate >= 0:
        return
    kwargs: Any = training.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    steps = training.max_steps if training.max_steps > 0 else STEPS
    try:
        schedule = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            training.get_warmup_steps(steps),
            steps,
            dict(kwargs or {}),
        )
        for at in (0, 1, steps // 2, steps - 1, steps):
            for factor in getattr(schedule, "lr_lambdas", []):
                factor(at)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        kind = word(training.lr_scheduler_type)
        takes = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[training.lr_scheduler_type])
        names = ", ".join(name for name in takes.parameters if name not in STANDARD)
        yield Problem(
            f"lr_scheduler_type: {kind} with lr_scheduler_kwargs: {kwargs or {}}: {error}",
            f"lr_scheduler_kwargs takes {names or 'nothing'} here",
            "schedule",
        )


def _template(training: KeepstepConfig) -> Iterator[Problem]:
    """Of a file; a tokenizer on the Hub is looked for when it is needed."""
    path = getattr(training, "chat_template_path", None)
    if path is None:
        return
    is_template = path.endswith(TEMPLATES)
    if Path(path).is_dir() or (not is_template and not Path(path).exists() and path.count("/") < 2):
        return
    if not Path(path).is_file():
        yield Problem(f"chat_template_path: there is no {path}", code="model")
    elif not is_template:
        hint = f"rename it to {Path(path).stem}.jinja"
        yield Problem(f"chat_template_path: {path} is no file ending in .jinja", hint, "model")
    else:
        try:
            _compile_jinja_template(Path(path).read_text(encoding="utf-8"))
        except (TemplateError, OSError, UnicodeDecodeError) as error:
            yield Problem(f"chat_template_path: {path}: {error}", code="model")

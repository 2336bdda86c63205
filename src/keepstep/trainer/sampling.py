"""Completions of a recipe's prompts, which the ranks write together: all of them pass the model as
often, so that none waits for another for ever, under ZeRO-3 either."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from keepstep.data.prompts import Prompt, read_prompts
from keepstep.data.tokenize import Positions
from keepstep.output.units import counted
from keepstep.policy.samples import Sample
from keepstep.ranks import collectives
from keepstep.recipe.problems import ConfigError, Problem


class Sampler:
    """The prompts of a run, as tokens; each rank writes the completions of some.

    Greedy, or drawn with random numbers of its own: a prompt gets the same ones whoever has it.
    Nothing of `generation_config` counts but the tokens that end a text.
    """

    def __init__(self, args: Any, tokenizer: Any, model: Any) -> None:
        """
        Args:
            args: the Trainer's, with the fields of the recipe.
            tokenizer: with the chat template that is trained with.
            model: the Trainer's.

        Raises:
            ConfigError: on every rank: there are no such prompts, or no tokens can be made of them.

        Ranks: all (collective).
        """
        self._tokenizer, self._seed, self._device = tokenizer, args.seed, args.device
        self._most, self._temperature = args.sample_max_new_tokens, args.sample_temperature
        self.name = str(args.sample_prompts)
        field = args.dataset_text_field
        prompts = collectives.on_main(
            "reading sample_prompts", lambda: _read(Path(self.name), field)
        )
        has_template = tokenizer.chat_template is not None
        self.prompts = [p.as_turns() if has_template else p for p in prompts]
        positions = Positions.of(model.config)
        self._tokens = collectives.on_all(
            "looking at sample_prompts",
            lambda: [self._encoded(n, p, positions) for n, p in enumerate(self.prompts, 1)],
        )
        self._ends = _ends(tokenizer, model)

    @property
    def compares(self) -> bool:
        """Whether there are references."""
        return any(prompt.reference is not None for prompt in self.prompts)

    def told(self) -> str:
        """What is said at the start."""
        turns = sum(prompt.text is None for prompt in self.prompts)
        kinds = ("in the chat template", turns), ("as they are", len(self.prompts) - turns)
        how = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
        return f"sample prompts: {self.name}: {how}; at most {self._most} new tokens"

    def _encoded(self, number: int, prompt: Prompt, positions: Any) -> list[int]:
        """
        Raises:
            ConfigError: it has no tokens, or more than the model takes.
        """
        try:
            if prompt.text is not None:
                tokens = self._tokenizer(prompt.text)["input_ids"]
            else:
                tokens = self._tokenizer.apply_chat_template(
                    prompt.turns, add_generation_prompt=True, return_dict=True, **prompt.options
                )["input_ids"]
        except Exception as error:  # jinja's, and what a template raises
            raise _error(f"{self.name}, prompt {number}: {error}") from error
        if not tokens:
            raise _error(f"{self.name}, prompt {number} has no tokens")
        limit = positions.limit if positions.learned else None
        if limit is not None and len(tokens) + self._most > limit:
            raise _error(
                f"{self.name}, prompt {number}: {counted(len(tokens), 'token')}, and "
                f"sample_max_new_tokens: {self._most}: the model has {limit} positions"
            )
        return list(tokens)

    def rehearse(self, model: Any) -> None:
        """Write one token: what cannot be done fails before the first step. Ranks: all
        (collective)."""
        self._written(model, 0, lambda: None, at_most=1)

    def complete(self, model: Any, step: int, got_on: Callable[[], None]) -> list[Sample]:
        """Write a completion of each prompt. Ranks: all (collective).

        Args:
            model: in its evaluation mode, without gradients.
            step: optimizer steps that it has made.
            got_on: is called at each token, on all ranks at the same one, and may raise.
        """
        count, size, rank = len(self.prompts), collectives.world_size(), collectives.rank()
        mine: dict[int, str] = {}
        for first in range(0, count, size):
            number = first + rank if first + rank < count else first  # too few are left for all
            mine[number] = self._written(model, number, got_on)
        texts: dict[int, str] = {}
        for part in reversed(collectives.gather(mine)):
            texts |= part
        return [
            Sample(step, number + 1, prompt.shown, texts[number], prompt.reference)
            for number, prompt in enumerate(self.prompts)
        ]

    def _written(
        self, model: Any, number: int, got_on: Callable[[], None], at_most: int | None = None
    ) -> str:
        """This rank's completion; as many passes as that of the rank whose is longest."""
        device = self._device
        given = torch.tensor([self._tokens[number]], device=device)
        generator = torch.Generator(device).manual_seed(self._seed + number)
        keeps, is_over = _keeps(model), False
        cache: dict[str, Any] = {"use_cache": True} if keeps else {}
        written: list[int] = []
        for _ in range(at_most or self._most):
            outputs = model(input_ids=given, **cache)
            token = self._next(outputs.logits[0, -1].float(), generator)
            is_over |= token is None
            if token is not None and not is_over:
                written.append(token)
            new = torch.tensor([[token or 0]], device=device)
            kept = getattr(outputs, "past_key_values", None) if keeps else None
            if kept is not None:
                cache["past_key_values"] = kept
            given = torch.cat([given, new], dim=1) if kept is None else new
            got_on()
            if not any(collectives.any_of(not is_over)):
                break
        return str(self._tokenizer.decode(written, skip_special_tokens=True))

    def _next(self, scores: Any, generator: Any) -> int | None:
        """The next token; None: the text is over, or the scores are no numbers."""
        if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
            return None
        if self._temperature:
            odds = ((scores - scores.max()) / self._temperature).softmax(-1)
            token = int(torch.multinomial(odds, 1, generator=generator))
        else:
            token = int(scores.argmax())
        return None if token in self._ends else token


def _read(path: Path, text_field: str) -> list[Prompt]:
    try:
        return read_prompts(path, text_field)
    except ValueError as error:
        raise _error(str(error)) from error


def _error(what: str) -> ConfigError:
    return ConfigError([Problem(f"sample_prompts: {what}", code="samples")])


def _keeps(model: Any) -> bool:
    """Whether the model can be given the next token alone, and keeps what came before. A learned
    prompt (PEFT) would be put ahead of that token again."""
    base, config = model, getattr(model, "active_peft_config", None)
    if config is not None:
        base = model.get_base_model()
    learned = bool(getattr(config, "is_prompt_learning", False))
    return not learned and "past_key_values" in inspect.signature(type(base).forward).parameters


def _ends(tokenizer: Any, model: Any) -> Sequence[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's `generation_config`."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = known if isinstance(known, list) else [known]
    return [token for token in (*own, tokenizer.eos_token_id) if token is not None]

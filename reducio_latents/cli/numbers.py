"""Option values that are a number or one word."""

from __future__ import annotations

from typing import Any

import click


class NumberOr(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or the one word that stands for a number found later."""

    name = "number"

    def __init__(self, word: str) -> None:
        self.word = word

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if isinstance(value, int) or value == self.word:
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self.word!r}.", param, ctx)

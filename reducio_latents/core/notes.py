"""What the source of a dataclass says of its fields: the string after each."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from functools import cache
from itertools import pairwise


@cache
def field_notes(cls: type, *, brief: bool = False) -> dict[str, str]:
    """Return the string literal that follows each field of a class in its source, on one line.

    `brief`: its first paragraph. None if there is no source, as in a package of bytecode alone.
    """
    notes = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        for field, note in pairwise(typing.cast(ast.ClassDef, tree.body[0]).body):
            match field, note:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=text)),
                ):
                    paragraph = str(text).partition("\n\n" if brief else "\0")[0]
                    notes[name] = " ".join(paragraph.split())
    return notes

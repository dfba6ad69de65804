"""Shows mkdocstrings that `@kernel_class` makes a dataclass, and `setting` a field.

mkdocstrings reads the source without importing it. Its reader, Griffe, knows the decorator of `dataclasses`
alone, so the kernels of `jax_mps.mps` would have no signature.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

INHERITED = re.compile(r"\n  \*\*members: (.*?)(?=\n\n|\Z)", re.DOTALL)


class KernelClasses(griffe.Extension):
    """The extension of Griffe that mkdocs.yml names."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called when a class and its members have been read."""
        if not any(str(decorator.value) == "kernel_class" for decorator in cls.decorators):
            return
        cls.decorators.append(
            griffe.Decorator(_call("dataclasses.dataclass", {"kw_only": "True"}), lineno=None, endlineno=None)
        )
        for member in cls.members.values():
            if member.is_attribute and str(member.value).startswith("setting("):
                member.value = _field(member.value)
        if cls.docstring:
            cls.docstring.value = INHERITED.sub(_sentence, cls.docstring.value)


def _sentence(match: re.Match[str]) -> str:
    """The entry of the inherited members as text: the signature has them one by one."""
    return "\n\nThe other members are " + re.sub(r"\s+", " ", match[1])


def _field(setting: griffe.ExprCall) -> griffe.ExprCall | None:
    """`setting(check, default, init=...)` as a call of `dataclasses.field`, or nothing without a default."""
    _, *rest = setting.arguments
    named = {a.name: a.value for a in rest if isinstance(a, griffe.ExprKeyword)}
    positional = [a for a in rest if not isinstance(a, griffe.ExprKeyword)]
    if positional:
        named["default"] = positional[0]
    return _call("dataclasses.field", named) if named else None


def _call(function: str, arguments: dict[str, Any]) -> griffe.ExprCall:
    keywords = [griffe.ExprKeyword(name, value) for name, value in arguments.items()]
    return griffe.ExprCall(griffe.ExprName(function), keywords)

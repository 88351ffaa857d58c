"""For `make docs`: docstrings in Hugging Face's form, as the reader of Google's form expects them."""

import re
from typing import Any

import griffe


ARGUMENT = re.compile(r"^( *\*{0,2}\w+) \((.+)\):$", re.MULTILINE)
RESULT = re.compile(r"^( +)`([^`]+)`: ", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\]")
"""What Hugging Face's own builder makes links of: [`SFTTrainer`], [`~trl.SFTTrainer`]."""


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = REFERENCE.sub(r"`\1`", obj.docstring.value)
            text = ARGUMENT.sub(lambda match: f"{match[1]} ({_type(match[2])}):", text)
            obj.docstring.value = RESULT.sub(r"\1\2: ", text)


def _type(text: str) -> str:
    """Types as a union, without what the signature says of defaults."""
    types = re.sub(r", (\*optional\*|defaults to ).*", "", text).replace("`", "")
    return re.sub(r"(?:,| or) (?![^\[]*\])", " | ", types)

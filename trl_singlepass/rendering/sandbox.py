"""transformers' sandbox for chat templates, caching its verdicts on plain data."""

from collections.abc import Callable
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any

from jinja2 import Environment, Template
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment


_OF_DICTS = frozenset(dir(dict))
_OF_LOOPS = ("index", "index0", "first", "last", "length", "revindex", "revindex0")
# As many as the arguments of calls in a conversation of a thousand turns.
_DICTS_KEPT = 4096
_PLAIN_TYPES = frozenset({bool, int, float, str, type(None), list, dict})


def _get_harmless_string_methods() -> frozenset[str]:
    """Methods of strings that the sandbox passes through: it decides by type and name, and wraps `format`."""
    sandbox = ImmutableSandboxedEnvironment()
    methods = {name: getattr("", name) for name in dir("") if not name.startswith("format")}
    return frozenset(name for name, method in methods.items() if sandbox.is_safe_attribute("", name, method))


_HARMLESS: dict[type, frozenset[str]] = {str: _get_harmless_string_methods(), LoopContext: frozenset(_OF_LOOPS)}


class CachingSandbox(ImmutableSandboxedEnvironment):
    """
    A sandbox that gives what `ImmutableSandboxedEnvironment` gives, faster on what templates do most.

    Templates spend most of their time looking up keys of messages, methods of strings, and fields of `loop` and
    `namespace`. For these exact types (not their subclasses), jinja's verdict depends on type and name alone.
    Everything else is left to jinja.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute of a value, or else its item, as the sandbox does."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_DICTS:
                return obj[attribute] if attribute in obj else _missing_key(self.undefined, attribute)  # type: ignore[arg-type]
        elif kind in _HARMLESS:
            if attribute in _HARMLESS[kind]:
                return getattr(obj, attribute)
        elif kind is self.globals["namespace"] and attribute[0] != "_":
            value = getattr(obj, attribute, self)
            if type(value) in _PLAIN_TYPES:
                return value
        return super().getattr(obj, attribute)

    # Both names as in jinja: what a template passes by keyword must not collide with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a value, as the sandbox does."""
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str:
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _cached(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """
    Cache a filter's results for the most recent dicts, because tools are printed in every rendering.

    Templates cannot change a dict, and nothing else holds the ones that they see.
    """
    made: dict[Any, tuple[Any, Any]] = {}

    def cached(value: object, *args: Any, **kwargs: Any) -> Any:
        if type(value) is not dict:
            return filter_(value, *args, **kwargs)
        key = id(value), args, *kwargs.items()
        if key not in made:
            made[key] = value, filter_(value, *args, **kwargs)  # the value is held, so that its id is not reused
            if len(made) > _DICTS_KEPT:
                del made[next(iter(made))]
        return made[key][1]

    return cached


@lru_cache
def _missing_key(undefined: type[Undefined], name: str) -> Undefined:
    """What a template gets for a key that a dict lacks. The dict itself stays hidden."""
    return undefined(obj={}, name=name)


@lru_cache
def compiled_template(source: str) -> Template | None:
    """
    Return a chat template in a [`CachingSandbox`] that is otherwise the environment of transformers.

    `None` if transformers runs it in a sandbox other than the one whose verdicts are cached.
    """
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # no public name: where it is gone, templates run through `apply_chat_template` alone
        return None
    environment: Environment = _compile_jinja_template(source).environment
    if type(environment) is not ImmutableSandboxedEnvironment:
        return None
    caching = CachingSandbox(
        trim_blocks=environment.trim_blocks,
        lstrip_blocks=environment.lstrip_blocks,
        extensions=[type(extension) for extension in environment.extensions.values()],
    )
    caching.filters = {**environment.filters, "tojson": _cached(environment.filters["tojson"])}
    caching.globals.update(environment.globals)
    return caching.from_string(source)

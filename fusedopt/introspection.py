"""What ``help()``, ``inspect.signature()`` and attribute access show of an optimizer class: made from torch's arguments
and from the class's settings."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

SETTINGS_DOC = """

    Besides torch's arguments (keyword-only; also attributes that may be changed between steps):

{settings}

    Parameters may be float64, float32, bfloat16 or float16, of any shape and strides, on any number of
    devices. States have the parameter's dtype, as in torch; 16-bit ones are computed in float32 and
    rounded once. Errors are torch's own where torch raises, else ValueError, TypeError or RuntimeError,
    raised before anything is changed.
"""


def add_documentation(cls: type) -> None:
    """The formulas and sources of its module, which ``help`` on the class should show, and its settings."""
    formulas = textwrap.indent(sys.modules[cls.__module__].__doc__ or "", "    ")
    settings = SETTINGS_DOC.format(settings=cls.settings_class.documentation())
    cls.__doc__ = f"{cls.__doc__}\n\n{formulas}{settings}"


def add_attributes(cls: type) -> None:
    """A property for each setting."""
    for name in cls.settings_class.fields():
        if not hasattr(cls, name):
            setattr(cls, name, _setting(name))


def _setting(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self._settings, name)

    def set(self: Any, value: Any) -> None:
        before = getattr(self._settings, name)
        setattr(self._settings, name, value)
        try:
            self._check_settings()
        except Exception:  # a group's options contradict it
            setattr(self._settings, name, before)
            raise

    return property(get, set, doc=f"The setting ``{name}``: see the class.")


def signature(cls: type, root: type) -> inspect.Signature:
    """That of an optimizer class; ``root`` is the base of all, whose constructor takes the settings."""
    return _own(cls, root) if _constructs(cls) else _merged(cls, root)


def add_constructor(cls: type) -> None:
    """An ``__init__`` that has the class's signature, for those who look at it instead of the class."""
    if "__init__" not in vars(cls):

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            super(cls, self).__init__(*args, **kwargs)

        __init__.__qualname__, __init__.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
        __init__.is_for_its_signature = True
        cls.__init__ = __init__
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    cls.__init__.__signature__ = inspect.Signature([first, *cls.__signature__.parameters.values()])


def _constructs(cls: type) -> bool:
    init = vars(cls).get("__init__")
    return init is not None and not hasattr(init, "is_for_its_signature")


def _merged(cls: type, root: type) -> inspect.Signature:
    """torch's arguments as the installed version has them, then ours."""
    base = next(c for c in cls.__mro__[1:] if _constructs(c) and c is not root)
    if issubclass(base, root):
        return inspect.signature(base)
    parameters = [
        *inspect.signature(base).parameters.values(),
        *inspect.signature(cls.settings_class).parameters.values(),
    ]
    # A user's class before ours may hand on **options, which stand last.
    return inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))


def _own(cls: type, root: type) -> inspect.Signature:
    """That of the class's own ``__init__``, with our settings for the ``**settings`` that it hands on."""
    found = inspect.signature(cls.__init__)
    _, *parameters = found.parameters.values()
    hands_on = next(c for c in cls.__mro__[1:] if _constructs(c)) is root
    if hands_on and parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        parameters[-1:] = inspect.signature(cls.settings_class).parameters.values()
    return found.replace(parameters=parameters)

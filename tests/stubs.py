"""What type checkers and editors read instead of ``fusedopt/__init__.py``: ``python tests/stubs.py`` writes it.

Signatures are put together at run time, where only ``inspect.signature`` sees them. In the stub every optimizer is a
class over the true one, with that signature; everything else that ``__init__.py`` imports is imported there too.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent
STUB = PACKAGE / "__init__.pyi"

HEADER = '''"""Made by tests/stubs.py from what inspect.signature shows."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
'''


def text() -> str:
    return "\n".join([HEADER, *imports(), "\n__version__: str", *classes(), ""])


def imports() -> Iterator[str]:
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for name in (alias.name for alias in node.names):
                yield f"from .{node.module or ''} import {name} as {'_' * (name in fusedopt.registry)}{name}"


def classes() -> Iterator[str]:
    for name in sorted(fusedopt.registry):
        arguments = "".join(f"        {line},\n" for line in ("self", *signature(fusedopt.registry[name])))
        yield f"\nclass {name}(_{name}):\n    def __init__(\n{arguments}    ) -> None: ..."


def signature(cls: type) -> Iterator[str]:
    keyword_only = False
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        default = "" if parameter.default is parameter.empty else f" = {written(parameter.default)}"
        yield f"{parameter.name}: {annotation(parameter.annotation)}{default}"


def written(default: Any) -> str:
    return f'"{default}"' if isinstance(default, str) else repr(default)


def annotation(of: Any) -> str:
    """As it is written: ours are strings, torch's are objects."""
    if isinstance(of, str):
        return of
    if of == ParamsT:
        return "ParamsT"
    inner = [annotation(argument) for argument in typing.get_args(of)]
    if typing.get_origin(of) in (typing.Union, types.UnionType):
        return " | ".join(inner)
    if inner:
        return f"{typing.get_origin(of).__name__}[{', '.join(inner)}]"
    return {None: "None", type(None): "None", Tensor: "Tensor"}.get(of) or of.__name__


if __name__ == "__main__":
    STUB.write_text(text())

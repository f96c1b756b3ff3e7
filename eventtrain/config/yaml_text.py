"""YAML by PyYAML's safe loader, without two surprises: ``1e-4`` is a number here, and a key given twice an error."""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse(text: str) -> Any:
    """The value of a document.

    Raises:
        ValueError: what is wrong and where. It quotes keys at most: values may be secrets.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:  # its str() quotes the line, and its problem tags and aliases
        mark = error.problem_mark
        problem = re.sub(r"(['\"]).*\1", "...", error.problem or "something is wrong")
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    except yaml.YAMLError as error:
        problem, where = type(error).__name__, ""
    raise ValueError(problem + where)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key `{key.value}` twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point and a signed exponent, and makes text of everything else.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)

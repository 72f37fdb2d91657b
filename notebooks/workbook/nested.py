"""Nested mappings by the paths of their values."""
from typing import Any

KeyPath = tuple[str, ...]


def leaves(values: dict[str, Any], prefix: KeyPath = ()) -> dict[KeyPath, Any]:
    """The values that are no mappings, by their paths of keys."""
    found: dict[KeyPath, Any] = {}
    for name, value in values.items():
        found |= leaves(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return found


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The same with a dot between the keys of a path."""
    return {".".join(map(str, path)): value for path, value in leaves(values).items()}

"""Fields of a `config.json`: what a file leaves out has its family's default."""

from collections.abc import Mapping
from typing import Any


class ConfigFields:
    """Reads fields by kind, and names the field in every error.

    Args:
        config: the file's content.
        defaults: of fields that it may leave out.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]):
        self._config, self._defaults = config, defaults

    def get(self, *names: str) -> Any:
        """The first of these fields that is there, else its default, else None."""
        for values in (self._config, self._defaults):
            for name in names:
                if name in values:
                    return values[name]
        return None

    def integer(self, *names: str, least: int = 1) -> int:
        """A whole number.

        Raises:
            ValueError: it is missing, something else, or below `least`.
        """
        value = self._present(names)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{self._name(names)} = {value!r}: expected a whole number, at least {least}"
            )
        return value

    def number(self, name: str) -> float:
        """A number.

        Raises:
            ValueError: it is missing, or something else.
        """
        value = self._present((name,))
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: expected a number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; null and a field that is nowhere are false.

        Raises:
            ValueError: it is something else.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: expected true or false")
        return bool(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; null is an empty one.

        Raises:
            ValueError: it is something else.
        """
        value = self.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
            raise ValueError(f"{name} = {value!r}: expected a list of whole numbers")
        return tuple(value)

    def refuse(self, name: str, allowed: Any, remedy: str) -> None:
        """Raise where a field has another value than the one that works.

        Raises:
            ValueError: naming it.
        """
        value = self.get(name)
        if value is not None and value != allowed:
            raise ValueError(f"{name} = {value!r} is not supported: {remedy}")

    def _present(self, names: tuple[str, ...]) -> Any:
        value = self.get(*names)
        if value is None:
            raise ValueError(f"{self._name(names)} is missing")
        return value

    def _name(self, names: tuple[str, ...]) -> str:
        """The field as the file spells it."""
        return next((name for name in names if name in self._config), names[0])

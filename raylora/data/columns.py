"""``--columns``: other names for the keys of records, before their form is looked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from raylora.data.record_forms import FORMS, MEANINGFUL_KEYS, Form, find_form, is_record
from raylora.errors import UserError

KNOWN_KEYS = tuple(dict.fromkeys([*(key for form in FORMS for key in form.keys), *MEANINGFUL_KEYS]))
"""The keys that a column may be named as."""
OWN = " (its own)"
"""Behind a key of the file whose name another column was given."""


class ColumnNames:
    """The keys of a file's records, and what they are read as.

    Args:
        columns: by the key that forms know, the file's own name of it; empty where all keys are what they are called.
    """

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        self._known = {column: key for key, column in (columns or {}).items()}

    def known(self, key: Any) -> Any:
        """What a key of the file is read as."""
        return self._known.get(key, key)

    def _renamed(self, keys: Collection[Any]) -> dict[Any, Any]:
        """By each key of a record, what it is read as; a key that a column takes the place of is left aside."""
        taken = {self._known[key] for key in keys if key in self._known}
        return {key: self._known.get(key, f"{key}{OWN}" if key in taken else key) for key in keys}

    def of_record(self, record: Any) -> Any:
        """A record with the names that forms know. What is no object stays as it is."""
        if not self._known or not isinstance(record, dict):
            return record
        names = self._renamed(record)
        return {names[key]: value for key, value in record.items()}

    def find_form(self, keys: Collection[Any]) -> Form | None:
        """The form of a record with these keys of the file; None where it has none."""
        return find_form({*self._renamed(keys).values()})

    def is_record(self, keys: Collection[Any]) -> bool:
        """Whether an object with these keys is itself a record; any other may wrap a list of records."""
        return is_record({*self._renamed(keys).values()})


def check_columns(columns: Mapping[str, str]) -> None:
    """Check that ``--columns`` names keys that forms know.

    Raises:
        UserError: it does not.
    """
    for key, column in columns.items():
        if key not in KNOWN_KEYS:
            hint = f"; write {column}={key} the other way round" if column in KNOWN_KEYS else ""
            raise UserError(f"--columns {key}={column}: {key} is no key of a record{hint}: {', '.join(KNOWN_KEYS)}")

"""Preference data, read to its end."""

from typing import NamedTuple

from rrlhf.data.load import Rejected, read_preferences
from rrlhf.types import Preference


class Loaded(NamedTuple):
    """Good rows, what each has beside the columns of its format, and bad rows."""

    preferences: list[Preference]
    columns: list[dict[str, object]]
    rejected: list[Rejected]


def load_preferences(source, **options):
    rejected = []
    rows = [*read_preferences(str(source), rejected=rejected, **options)]
    return Loaded([pair for pair, _ in rows], [columns for _, columns in rows], rejected)

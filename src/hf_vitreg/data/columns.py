# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Which column of a table holds the images, the labels or the texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets


def choose_column(
    features: Mapping[str, Any],
    what: str,
    given: str | None,
    usual: Sequence[str],
    kind: type | str,
    option: str,
    source: str,
) -> str:
    """The column as given, as it is usually called, or the only one of its kind.

    Args:
        features: What each column holds.
        what: `image`, `label` or `caption`.
        given: What the user calls it.
        usual: What people call it, the most usual first.
        kind: Class of what it holds, or the name of a type of values.
        option: By which the user can say.
        source: What to call the table.

    Raises:
        ValueError: where there is no such column, or several that could be it.
    """
    of_kind = [name for name, feature in features.items() if _is_a(feature, kind)]
    chosen = given or _usual_or_only(features, usual, of_kind)
    if chosen not in features:
        found = f"no column {chosen!r}" if chosen else f"{len(of_kind) or 'no'} columns of {what}s"
        raise ValueError(
            f"{source} has {found}, and must say which one holds the {what}s: set {option} to one of "
            f"{', '.join(features)}."
        )
    return chosen


def could_be(features: Mapping[str, Any], usual: Sequence[str], kind: type | str) -> bool:
    """Whether one of the columns is called as usual, or one alone is of this kind; as for `choose_column`."""
    return _usual_or_only(features, usual, [name for name in features if _is_a(features[name], kind)]) is not None


def _usual_or_only(features: Mapping[str, Any], usual: Sequence[str], of_kind: Sequence[str]) -> str | None:
    named = [name for name in usual if name in features]
    return named[0] if named else of_kind[0] if len(of_kind) == 1 else None


def _is_a(feature: Any, kind: type | str) -> bool:
    if isinstance(kind, str):
        return isinstance(feature, datasets.Value) and kind in feature.dtype  # string or large_string, int64 or int32
    return isinstance(feature, kind)

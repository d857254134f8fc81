"""Settings of a run check themselves."""

from pathlib import Path
from typing import Any

import pytest

import lnr_prune as lnr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"work": 3}, "work must be the path of a folder, or None, got 3"),
        ({"low_memory": "no"}, "low_memory must be True or False, got 'no'"),
        ({"progress": "bar"}, "progress must be True, False, None or a function that takes a string, got 'bar'"),
        ({"alone": None}, "alone must be True or False, got None"),
    ],
)
def test_a_run_checks_itself(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lnr.Run(**values)


def test_a_folder_is_named_by_a_text_or_a_path() -> None:
    assert lnr.Run("half-done").work == "half-done"
    assert lnr.Run(Path("half-done"), progress=print).work == Path("half-done")

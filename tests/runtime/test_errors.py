"""Numbers outside of their bounds."""

import math
from types import SimpleNamespace

import pytest

from rqa.runtime.errors import UserError, check_bounds


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"at_least": 1}, "--n 0: must be at least 1"),
        (0.0, {"above": 0, "at_most": 1}, "--n 0.0: must be above 0 and at most 1"),
        (1.0, {"at_least": 0, "below": 1}, "--n 1.0: must be at least 0 and less than 1"),
        (math.nan, {"at_least": 0}, "--n nan: must be at least 0"),
        ([4, 0], {"at_least": 1}, "--n 0: must be at least 1"),
    ],
)
def test_what_is_outside_is_refused_by_name(value: object, bounds: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        check_bounds(SimpleNamespace(n=value), "n", **bounds)


def test_the_bounds_themselves_and_what_is_not_given_pass() -> None:
    check_bounds(SimpleNamespace(a=1, b=2.0, c=None, d=[1, 2], e=[]), *"abcde", at_least=1, at_most=2)

"""What tests of `speed_up` share: plans for modules so small that a user's would be left alone, and a plan of the test's choice."""

from collections.abc import Callable

import pytest

from crossattention.interop import reader
from crossattention.interop.replace_transformers import ModuleReader
from crossattention.plan import Plan


@pytest.fixture
def plans_for_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan | None], None]:
    """No context is too small; called with a plan, every call that does not ask for weights runs that one."""
    monkeypatch.setattr(reader, "LEAST_FLOPS", 0)
    monkeypatch.setattr(ModuleReader, "_own_is_as_quick", lambda *args: False)

    def pin(plan: Plan | None) -> None:
        if plan is not None:
            monkeypatch.setattr(reader.Reader, "_choose", lambda *args, **kwargs: plan)

    return pin

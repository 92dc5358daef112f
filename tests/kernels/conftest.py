"""What Triton's interpreter needs to run the kernels here."""

import os
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def loops_with_a_run_time_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 makes a loop's end an int in a way that numpy 2.4 refuses; only its private hook can be changed."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)

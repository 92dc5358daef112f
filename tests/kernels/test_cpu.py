"""The CPU kernels' way onto a machine; what they compute is in test_ops.py."""

import os
import subprocess
import sys

SCRIPT = """
import torch
from rana_compile.kernels import ops
ops.load("cpu")
x, level, weight = torch.randn(2, 8), torch.full((8,), 0.3), torch.randn(6, 8)
up, down = torch.randn(8, 8), torch.randn(4, 6)
calls = {
    "linear": (x, weight, None),
    "masked_linear": (x, level, weight.t(), None),
    "rank_linear": (x, torch.eye(8), level, weight.t(), None),
    "gated_mlp": (x, level, up, None, level[:4], down, None, "silu"),
    "gated_up": (x, level, up[:, :4], level[:4], up[:4], None, "silu"),
}
assert set(calls) == set(ops.NAMES)
for name, arguments in calls.items():
    assert torch.isfinite(getattr(torch.ops.rana, name)(*arguments)).all(), name
"""


def test_without_a_compiler_every_op_runs_and_says_that_it_is_slow() -> None:
    environment = os.environ | {"PATH": "", "CXX": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found" in result.stderr

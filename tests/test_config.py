import pytest

from rana_compile.config import BackendOptions
from rana_compile.types import ConfigError


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        (
            {"plan": "p", "prefil": "dense"},
            None,
            "unknown option 'prefil'; known options: plan, prefill, include, exclude, min_features, free_dense_weights",
        ),
        ({"plan": "p", "prefill": "both"}, None, "expected 'adapted' or 'dense'"),
        ({"plan": "p", "mode": "default"}, "max-autotune", "contradicts"),
        ({"plan": "p", "inductor": 3}, None, "expected a dict"),
        ({"plan": "p", "mode": "fastest"}, None, "known modes"),
        ({"plan": "p", "flops_budget": 0.5}, None, "'flops_budget' is for calibration without a plan"),
        ({"calibration_tokens": 0}, None, "'calibration_tokens' is 0; expected a number of at least 1"),
        ({"max_divergence": "low"}, None, "'max_divergence' is 'low'"),
        ({"min_features": -1}, None, "'min_features' is -1"),
        ({"free_dense_weights": "all"}, None, "'free_dense_weights' is 'all'; expected True or False"),
    ],
)
def test_bad_options_say_what_is_known(options: dict | None, mode: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        BackendOptions.parse(options, mode)


def test_no_option_is_needed() -> None:
    assert BackendOptions.parse(None).plan is None


def test_mode_may_come_from_either_place() -> None:
    assert BackendOptions.parse({"plan": "p"}, "max-autotune").mode == "max-autotune"
    assert BackendOptions.parse({"plan": "p", "mode": "max-autotune"}).mode == "max-autotune"

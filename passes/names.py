"""Names of parameters in a Dynamo graph, as in ``model.state_dict()``, from where Dynamo found them.

    L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight'] → model.layers.0.weight

A tied weight is found under its first name; the module that uses it (``nn_module_stack``) gives the
name a reader expects (``lm_head.weight``).
"""

import re

from torch import fx, nn

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_DICT = re.compile(r"__dict__\['(_modules|_parameters|_buffers)'\]")  # modules that define __getattr__, as peft's
_PATH = re.compile(r"^[LG]\['[^']+'\](?:\[\d+\])*\.?")  # L['self'], or L['args'][0] of a wrapper such as accelerate's


def source_name(placeholder: fx.Node) -> str | None:
    """The parameter's dotted name relative to the compiled module, or None if it is not a module's tensor."""
    source = getattr(placeholder, "_dynamo_source", None)
    parts = _PART.findall(_DICT.sub(r"\1", source.name) if source is not None else "")
    return ".".join(parts) or None


def used_name(user: fx.Node, placeholder: fx.Node) -> str | None:
    """The same, but for a tied weight under the name of the linear that uses it."""
    source = source_name(placeholder)
    path = module_name(user)
    if source is None or not path or not _is_linear(user):
        return source
    return f"{path}.{source.rpartition('.')[2]}"


def _is_linear(node: fx.Node) -> bool:
    _, kind = list(node.meta["nn_module_stack"].values())[-1]
    return isinstance(kind, type) and issubclass(kind, nn.Linear)


def module_name(node: fx.Node) -> str | None:
    """The dotted name of the module that computes a node, or None outside of one."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = _PATH.sub("", _DICT.sub(r"\1", list(stack.values())[-1][0]))
    return re.sub(r"_modules\['([^']+)'\]", r"\1", path) or None

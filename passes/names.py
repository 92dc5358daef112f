"""Names of parameters in a Dynamo graph, as in ``model.state_dict()``, from where Dynamo found them.

    L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight'] → model.layers.0.weight

A tied weight is found under its first name; the module that uses it (``nn_module_stack``) gives the
name a reader expects (``lm_head.weight``).
"""

import re

from torch import fx

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_PATH = re.compile(r"^[LG]\['[^']+'\]\.?")


def source_name(placeholder: fx.Node) -> str | None:
    """The parameter's dotted name relative to the compiled module, or None if it is not a module's tensor."""
    source = getattr(placeholder, "_dynamo_source", None)
    parts = _PART.findall(source.name if source is not None else "")
    return ".".join(parts) or None


def used_name(user: fx.Node, placeholder: fx.Node) -> str | None:
    """The same, but under the name of the module that computes ``user`` where that module holds the tensor."""
    source = source_name(placeholder)
    stack = user.meta.get("nn_module_stack")
    if source is None or not stack:
        return source
    path = _PATH.sub("", list(stack.values())[-1][0])
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    leaf = source.rpartition(".")[2]
    return f"{path}.{leaf}" if path else source

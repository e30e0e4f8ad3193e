"""The metrics under every published convention. All files in this package are imported, so that they can register."""

from configs.registry import import_each_file
from evaluation.metrics import conventions, scores, tools

import_each_file(__name__, __path__)


_REGISTRIES = (scores.METRICS, conventions.CONVENTIONS, tools.TOOL_METRICS)
_OWN = {name for registry in _REGISTRIES for name in registry.names(plugins=False)}


def plugin_names() -> list[str]:
    """Return the names of metrics and conventions that were registered by plug-ins, sorted."""
    return sorted({name for registry in _REGISTRIES for name in registry.names()} - _OWN)

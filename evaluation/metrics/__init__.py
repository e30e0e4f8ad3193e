"""The metrics under every published convention. All files in this package are imported, so that they can register."""

from configs.registry import import_each_file
from evaluation.metrics import conventions, scores

import_each_file(__name__, __path__)


def plugin_names() -> list[str]:
    """Return the names of metrics and conventions that were registered by plug-ins, sorted."""
    return sorted({*scores.METRICS.names(), *conventions.CONVENTIONS.names()} - OWN)


OWN = {*scores.METRICS.names(plugins=False), *conventions.CONVENTIONS.names(plugins=False)}

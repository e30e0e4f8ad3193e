"""The metrics, under every published convention. Each file here that registers a metric or a convention is imported."""

from configs.registry import import_each_file
from evaluation.metrics import conventions, scores

import_each_file(__name__, __path__)


def plugin_names() -> list[str]:
    """Metrics and conventions that others have registered, sorted."""
    return sorted({*scores.METRICS.names(), *conventions.CONVENTIONS.names()} - OWN)


OWN = {*scores.METRICS.names(plugins=False), *conventions.CONVENTIONS.names(plugins=False)}

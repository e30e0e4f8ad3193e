"""The metrics, under every published convention. Each file here that registers a metric or a convention is imported."""

from importlib import import_module
from pkgutil import iter_modules

from evaluation.metrics import conventions, scores

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")


def plugin_names() -> list[str]:
    """Metrics and conventions that others have registered, sorted."""
    return sorted({*scores.METRICS.names(), *conventions.CONVENTIONS.names()} - OWN)


OWN = {*scores.METRICS.names(plugins=False), *conventions.CONVENTIONS.names(plugins=False)}

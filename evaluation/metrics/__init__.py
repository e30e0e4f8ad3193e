"""The metrics, under every published convention. Each file here that registers a metric or a convention is imported."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

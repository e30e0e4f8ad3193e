"""The networks, one file per family. Every file in this folder is imported and registers its networks."""

from configs.registry import import_each_file

import_each_file(__name__, __path__)

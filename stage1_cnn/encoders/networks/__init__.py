"""The networks, one file per family. Each file here is imported and registers its networks."""

from configs.registry import import_each_file

import_each_file(__name__, __path__)

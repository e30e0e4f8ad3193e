"""The formats of annotation files. Every file in this folder is imported and registers its format."""

from configs.registry import import_each_file

import_each_file(__name__, __path__)

"""Temporal heads, which map a sequence of embeddings to phase logits.

Every file in this folder is imported and registers its heads.
"""

from configs.registry import import_each_file

import_each_file(__name__, __path__)

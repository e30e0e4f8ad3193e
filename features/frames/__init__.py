"""From an indexed source to preprocessed frames, and the cache between them."""

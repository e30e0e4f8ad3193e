"""Read frames from an indexed source, preprocess them, and cache decoded frames."""

"""The metrics, under every published convention."""

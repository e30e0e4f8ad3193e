"""Numbers, tables, figures and files out: what a prediction is worth, under every published convention."""

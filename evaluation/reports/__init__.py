"""Make tables, figures, HTML pages and model cards of results."""

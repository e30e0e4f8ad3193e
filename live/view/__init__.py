"""The viewer: a local server whose page shows videos, labels and predictions, and in which labels are corrected.

`videos`, `rows` and `labels` know what was opened; `app` answers the page's requests, behind `access`; `serve` runs it.
"""

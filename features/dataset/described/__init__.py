"""Labels in files whose form the data set's description states (`labels`).

`records` reads tables and JSON into columns, `labels` turns columns into labels, and `intervals` places them on frames.
"""

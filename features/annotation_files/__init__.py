"""Files of annotation tools: labelled intervals of videos, read from and written as ELAN, Label Studio and CSV files.

`intervals` has the form into which every reader turns its files and from which every writer starts.
"""

"""Recognition in videos that are not part of a data set: of files, and while an operation is recorded."""

"""Read and write files of predictions and truth, in this project's formats and those of other programs."""

"""What a data set's files say: which videos there are, their labels, splits and phase order."""

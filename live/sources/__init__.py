"""Where the frames of a stream come from: files, devices and addresses, standard input."""

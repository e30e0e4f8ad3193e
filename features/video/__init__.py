"""Read and write video. Every decoder follows the same definition of frame k (`features.video.base`)."""

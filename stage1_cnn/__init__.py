"""Stage one: a backbone fine-tuned on tool presence, and the embeddings it gives each frame."""

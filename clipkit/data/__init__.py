"""From files to batches: images, image–caption pairs, prompts. Never imports the model."""

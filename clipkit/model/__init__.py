"""From batches to unit vectors: tokenizer, towers, loss, checkpoints."""

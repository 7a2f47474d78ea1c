"""Contrastive pretraining: data, loss, step, loop, recovery."""

"""Classifiers over vectors: zero-shot, few-shot, saved heads."""

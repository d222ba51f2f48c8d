"""Texts with labels: tasks of sentences, corpora of labelled words."""

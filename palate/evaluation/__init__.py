"""Evaluation: who wins, by how much, how surely, and a page that shows it."""

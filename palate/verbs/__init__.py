"""What ``palate VERB`` does: one module a verb, each with ``main(words) -> int``, a few lines over a library call."""

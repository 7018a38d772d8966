"""A page on which people judge pictures: who sees which pair, votes that are kept, and what they say."""

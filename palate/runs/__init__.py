"""A recipe carried out: its options, the two orders of events, and what is made of a finished run."""

"""The builder of the miniature world: renderer, raters, trainings, votes, cards."""

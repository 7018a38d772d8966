"""Names of judges, rewards and prompts, as recipes and commands use them, to things that are known to be loadable."""

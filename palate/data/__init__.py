"""Preference pairs and their readers, pictures, prompts, the cache of encoded latents and text."""

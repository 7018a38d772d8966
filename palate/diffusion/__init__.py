"""Noise schedules, noised batches and residuals."""

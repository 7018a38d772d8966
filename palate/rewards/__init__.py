"""Rewards: what online training makes larger. One kind of function, evaluated beside sampling, and watched over."""

from palate.rewards.bundle import Pending, RewardBundle, Rewards
from palate.rewards.held_out import HeldOut, parted
from palate.rewards.reward import Reward, RewardError, from_function, from_judge

__all__ = ["HeldOut", "Pending", "Reward", "RewardBundle", "RewardError", "Rewards", "from_function", "from_judge", "parted"]

"""Reward models: what they are, how they are named, weighed and checked. The shipped ones are in reward_models/."""

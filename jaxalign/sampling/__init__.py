"""Schedules, samplers, guidance and rollouts: the only code that knows what a network predicts."""
from jaxalign.sampling.guidance import Conditioning, Guided, branches, guided, guided_output
from jaxalign.sampling.rollout import (
    Trajectory,
    differentiable_rollout,
    initial_noise,
    pull_back,
    replay,
    rollout,
    step_noise,
    transition,
)
from jaxalign.sampling.samplers import Sampler, make_sampler, noisy_within
from jaxalign.sampling.schedule import ONE_STEP_KEY, ONE_STEP_SCALE_KEY, Schedule, expand

__all__ = [
    "ONE_STEP_KEY", "ONE_STEP_SCALE_KEY", "Conditioning", "Guided", "Sampler", "Schedule",
    "Trajectory", "branches", "differentiable_rollout", "expand", "guided", "guided_output",
    "initial_noise", "make_sampler", "noisy_within", "pull_back", "replay", "rollout", "step_noise",
    "transition",
]

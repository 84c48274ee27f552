"""Schedules, samplers, guidance and rollouts: the only code that knows what a network predicts."""
from jaxalign.sampling.guidance import Conditioning, Guided, guided, guided_eps
from jaxalign.sampling.rollout import (
    Trajectory,
    differentiable_rollout,
    initial_noise,
    replay,
    rollout,
    step_noise,
    transition,
)
from jaxalign.sampling.schedule import (
    ONE_STEP_KEY,
    ONE_STEP_SCALE_KEY,
    Sampler,
    Schedule,
    expand,
    make_sampler,
)

__all__ = [
    "ONE_STEP_KEY", "ONE_STEP_SCALE_KEY", "Conditioning", "Guided", "Sampler", "Schedule",
    "Trajectory", "differentiable_rollout", "expand", "guided", "guided_eps", "initial_noise",
    "make_sampler", "replay", "rollout", "step_noise", "transition",
]

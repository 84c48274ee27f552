"""DDPO: policy gradients on the sampler's steps, with the reward standardised prompt by prompt.

Every denoising step is an action with a Gaussian law, and the reward comes with the last one (Black
et al. 2023, "Training Diffusion Models with Reinforcement Learning"). The method is
`shared/policy_gradient.py` with its default options. On a flow model with `sample.kind="flow_sde"`
and advantages within groups it is Flow-GRPO without its KL term (Liu et al. 2025).
"""
from jaxalign.methods.shared import policy_gradient

Config, make = policy_gradient.Config, policy_gradient.make

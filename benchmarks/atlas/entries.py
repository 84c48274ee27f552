"""The methods of the atlas: keys, budgets, and what each of them is said to converge to."""
from benchmarks.atlas.laboratory import Entry

RAW = dict(beta=1.0, beta_unit="raw")
STEPS = dict(clip_range=0.1, step_weights="even")
KL = dict(STEPS, group=8, minibatches=2, kl=1.0, kl_unit="raw")

ENTRIES = (
    # ---- at inference
    Entry("fk_steering", dict(RAW, particles=8), "tilt",
          "Weights make up for every choice on the way, the start included; what is left is of "
          "order 1 / K.", updates=5),
    Entry("das", dict(RAW, particles=4), "tilt",
          "The same limit with gradients in the proposal, here with half as many particles.",
          updates=0),
    Entry("svdd", dict(RAW, candidates=8), "another law",
          "Softmax of the clean estimate's reward without weights: near the tilt, and off where "
          "the estimate misleads.", updates=0),
    Entry("svdd", dict(RAW, candidates=8, select="argmax"), "another law",
          "The best at every step, whatever the strength: far up, and masses as they were.",
          updates=0, label="svdd, argmax"),
    Entry("best_of_n", {}, "another law",
          "Of N samples the best: N is the only strength, and the law has the shape of no tilt.",
          strength="candidates", updates=2),
    Entry("dno", dict(prno=0.0, prno_vector=0.0, keep_best=False, min_p=0.0, block=1,
                      permutations=1), "another law",
          "Climbs from where each image is: the tilt for linear rewards; here it goes to the top "
          "of its own mode and leaves the masses alone.", updates=21, lr=5e4),
    # ---- trained, with a target
    Entry("nabla_gfn", RAW, "another law",
          "Without a flow net the reward's gradient at the clean estimate stands for the value's: "
          "right within a mode, and hardly moves mass between modes."),
    Entry("nabla_gfn", dict(RAW, flow=True, reverse="lean"), "tilt given the noise",
          "The flow net is to learn what the estimate leaves out; at its default rate these few "
          "updates do not show it.", label="nabla_gfn, flow net"),
    Entry("adjoint_matching", RAW, "tilt given the noise",
          "The value's gradient is carried back through the base's chain; policies whose steps "
          "keep their variance fall short of the tilt by order 1 / steps."),
    Entry("dpok", KL, "tilt given the noise",
          "The same optimum from rewards alone, with the whole gradient of the KL.", batch=128),
    Entry("flow_grpo", dict(KL, interval="full", interval_first=1.0, advantage="group_loo",
                            advantage_clip=1e9, kl_form="nats", kl_gradient="full"),
          "tilt given the noise", "With the exact KL and raw rewards it is DPOK on its own chain.",
          batch=128, chain="sde", label="flow_grpo, tilt"),
    Entry("nft", dict(prox=8.0, tilt_budget=1.0, weighting="own", advantage_clip=20.0,
                      old_rate=1.0, old_cap=0.96), "tilt",
          "Small steps along the tangent of the tilt add up to it; the budget ends them.",
          chain="ode", batch=128),
    Entry("ram", dict(eta=1.0, advantage_clip=20.0), "first-order tilt",
          "The tangent at its own samples in place of the integral: a concave reward is tilted by "
          "less.", chain="ode", batch=128, line_scale=0.5),
    Entry("awm", dict(weighting="uniform", kl=0.05, kl_old=0.0, advantage_clip=20.0,
                      baseline="loo"), "first-order tilt",
          "With even levels and a KL it is RAM's fixed point.", chain="ode", batch=128,
          line_scale=0.5),
    Entry("diffusion_dpo", dict(beta=10.9), "first-order tilt",
          "For weak rewards the tilt, with the beta that makes up for the noise levels; for strong "
          "ones errors of the losing image grow without an image to match.", batch=128),
    Entry("mapo", {}, "another law",
          "Preferred images become likelier and rejected ones less so, with nothing that says by "
          "how much.", batch=128),
    Entry("sft", {}, "another law",
          "The law of the preferred images: half of a comparison, however strong the reward.",
          batch=128),
    # ---- trained, without one
    Entry("ddpo", STEPS, "mode",
          "Standardised rewards and no KL: stopping is the only temperature.",
          strength="length", batch=128),
    Entry("b2_diffurl", dict(STEPS, group=4, interval_stages=80), "mode",
          "The same with branches, whose comparisons say little about the early steps.",
          strength="length", batch=128),
    Entry("flow_grpo", dict(STEPS, group=8, minibatches=2), "mode",
          "Its KL of 0.04 per standard deviation is no anchor.", strength="length", chain="sde",
          batch=128),
    Entry("draft", {}, "another law",
          "The last step alone: the top of the mode that a sample is in already.",
          strength="length"),
    Entry("draft", dict(backprop_steps=0), "mode", "Through all steps: the reward's maximum.",
          strength="length", label="draft, full"),
    Entry("refl", {}, "another law", "Late steps only, as DRaFT-1.", strength="length"),
    Entry("alignprop", {}, "another law", "Mostly late steps: between the two.",
          strength="length"),
)

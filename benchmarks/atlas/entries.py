"""The methods of the atlas: keys, budgets, and what each of them is said to converge to."""
from benchmarks.atlas.laboratory import Entry

RAW = dict(beta=1.0, beta_unit="raw")
GROUPS = dict(group=8, clip_range=0.1, step_weights="even", minibatches=2)
KL = dict(kl=1.0, kl_unit="raw", clip_range=0.2, group=8, minibatches=2, step_weights="even")

ENTRIES = (
    # ---- at inference
    Entry("fk_steering", dict(RAW, particles=16), "tilt", "", updates=5),
    Entry("das", dict(RAW, particles=8), "tilt", "", updates=0),
    Entry("svdd", dict(RAW, candidates=16), "another law", "", updates=0),
    Entry("svdd", dict(RAW, candidates=16, select="argmax"), "nothing", "", updates=0,
          label="svdd, argmax"),
    Entry("best_of_n", {}, "another law", "", strength="candidates", updates=2),
    Entry("dno", dict(prno=0.0, prno_vector=0.0, keep_best=False, min_p=0.0, block=1,
                      permutations=1), "nothing", "", updates=20, lr=5e4),
    # ---- with a target
    Entry("nabla_gfn", RAW, "tilt given the noise", ""),
    Entry("nabla_gfn", dict(RAW, flow=True, reverse="lean"), "tilt given the noise", "",
          label="nabla_gfn, flow net"),
    Entry("adjoint_matching", RAW, "tilt given the noise", ""),
    Entry("dpok", KL, "tilt given the noise", "", batch=256),
    Entry("flow_grpo", dict(KL, interval="full", interval_first=1.0, advantage="group_loo",
                            advantage_clip=1e9, kl_form="nats", kl_gradient="full"),
          "tilt given the noise", "", batch=256, chain="sde", label="flow_grpo, tilt"),
    Entry("nft", dict(prox=8.0, tilt_budget=1.0, weighting="own", advantage_clip=20.0),
          "tilt", "", chain="ode", batch=256),
    Entry("ram", dict(eta=1.0, baseline="min", advantage_clip=20.0), "first-order tilt", "",
          chain="ode", batch=256),
    Entry("awm", dict(weighting="uniform", kl=0.2, kl_old=0.0, baseline="min"),
          "first-order tilt", "", chain="ode", batch=256),
    Entry("diffusion_dpo", dict(beta=10.9), "first-order tilt", "", batch=256),
    Entry("mapo", {}, "another law", "", batch=256),
    Entry("sft", {}, "another law", "", batch=256),
    # ---- without one
    Entry("ddpo", dict(clip_range=0.1, step_weights="even"), "mode", "", strength="length",
          batch=256),
    Entry("b2_diffurl", dict(clip_range=0.1, step_weights="even", group=4, interval_stages=100),
          "mode", "", strength="length", batch=256),
    Entry("flow_grpo", dict(GROUPS), "mode", "", strength="length", chain="sde", batch=256),
    Entry("draft", {}, "mode", "", strength="length"),
    Entry("draft", dict(backprop_steps=0), "mode", "", strength="length", label="draft, full"),
    Entry("refl", {}, "mode", "", strength="length"),
    Entry("alignprop", {}, "mode", "", strength="length"),
)

READING = """
# Atlas: where every method ends
"""

"""The embedded scorers `emoji_clip` and `emoji_judge`, from drawings and captions.

Command:
  python -m jaxalign.data.emoji --output=DATA
  python -m jaxalign.rewards.train_scorers --config=configs/pretrain_emoji_scorers.py \
      --data=DATA/emoji.npz --output=DIR

Measured on 2 CPU cores shared with other work: 41 minutes for emoji_clip, 6 for emoji_judge.
Retrieval among 20 captions on held-out name-colour pairs: 97.5 % and 99.2 %. Peak memory: not
measured. More figures are in the assets' README.md.
"""
import ml_collections


def get_config(arg: str = ""):
  """`arg`: empty for the shipped scorers, `smoke` for three steps of tiny ones."""
  smoke = arg == "smoke"
  config = ml_collections.ConfigDict()
  config.data = dict(
      categories=("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities"),
      colours_per_step=4,    # of 12: the fewer, the more wrong names share their background
      style_fraction=0.25,    # captions that name the vendor's style
  )
  config.optim = dict(warmup=0.05, weight_decay=0.05, clip=1.0)  # warm-up as a fraction of steps
  config.train = dict(save_every=200, log_every=20)              # steps
  config.eval = dict(images=1024)                                # per figure

  tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
               projection_dim=16) if smoke else None
  config.emoji_clip = dict(
      seed=1, steps=3 if smoke else 1000, names=4 if smoke else 64, lr=1e-3,
      max_logit_scale=30.0,   # caps 1 / temperature, so that scores spread over [-1, 1]
      latent_noise=1.0,       # half of the images: up to this std, where latents have std 1
      model=dict(
          text_config=tower or dict(
              hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
              projection_dim=128),
          vision_config=dict(image_size=32, patch_size=4, **(tower or dict(
              hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
              projection_dim=128)))))
  config.emoji_judge = dict(
      seed=2, steps=3 if smoke else 1000, names=4 if smoke else 64, lr=2e-3,
      max_logit_scale=30.0, latent_noise=0.0,
      model=dict(dim=16 if smoke else 64, widths=(8, 8) if smoke else (32, 64, 128),
                 text_width=16 if smoke else 128))
  config.lock()
  return config

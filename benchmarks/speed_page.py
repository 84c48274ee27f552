"""docs/updates.md out of what `benchmarks/updates.py` measured."""
import statistics

HEAD = """# Speed beside PyTorch

Written by `python -m benchmarks.updates`; every number is read from [updates.json](updates.json).

One step of each method by jaxalign and by the same algorithm in plain PyTorch with diffusers and peft (`benchmarks/torch_updates.py`), in one process on the same cores, taking turns. Before anything is timed both take a step from the same weights with the same random numbers; *agree* is the larger relative difference of loss and gradient then, at most 1e-4.

*times as fast* is PyTorch's median over ours, above 1 where jaxalign is faster, and the range of the rounds' own ratios; *by CPU time* is the same of the process's CPU seconds, which other work on the machine disturbs less. *s* are medians and ranges of seconds a step. Fewer than seven rounds are marked as too few. *TFLOP* are the operations of a step: ours are XLA's count of one call of each network, times the calls that the method counts; PyTorch's are those that its counter saw in products and convolutions. *GFLOP/s* are these over the median time, and *of a product* is that rate as a share of what a product of 1024-square matrices reached in the same rounds, in the faster of both libraries. *compiled*: whether `torch.compile` made PyTorch faster, which it then was timed with. *load* is the machine's load average, in cores: above the number of cores other work took its share of both sides.

The last rows are no methods but what these are made of, at the rows of a batch of nabla-GFlowNet: a batch of pictures drawn, decoded and scored; the guided denoiser; it with its gradient to the adapter; decoder and scorer with their gradient to the latent.

Machines of this kind differ from day to day by a factor of almost two, and ratios with them: compare only what ran together.
"""  # noqa: E501
BOTH = ("ours", "PyTorch's")
COLUMNS = ("times as fast", "by CPU time", *(f"{name}, {side}" for name in (
    "s", "TFLOP", "GFLOP/s", "of a product") for side in BOTH),
    "rounds", "batch, steps, guidance", "compiled", "agree", "load")
ROUNDS = 7               # that a median needs


def page(results: dict) -> str:
  """The page of `{"MODEL/METHOD": entry}`, a table for each machine and model."""
  tables: dict[tuple, list] = {}
  for key, entry in results.items():
    if entry["rounds"]:
      model, _, name = key.rpartition("/")
      tables.setdefault((model, *map(str, entry["machine"].items())), []).append((name, entry))
  out = [HEAD]
  for (model, *_), rows in tables.items():
    out += [f"## {model}", "", about(model, rows[0][1]), "", cells("step", *COLUMNS),
            "|" + "---|" * (len(COLUMNS) + 1), *(line(*row) for row in rows), ""]
  return "\n".join(out)


def about(model: str, entry: dict) -> str:
  """Machine and model in words."""
  m = entry["machine"]
  text = (" PyTorch reads the 256 zero vectors in place of an absent T5 one by one, as diffusers' "
          "pipeline gives them; in jaxalign one token stands for all."
          if entry["padded"] else "")
  return (f"{m['cpu']}, {m['cores']} cores, {m['devices']} devices of jaxalign and {m['cores']} "
          f"threads of PyTorch, float32; jax {m['jax']}, torch {m['torch']}, diffusers "
          f"{m['diffusers']}, peft {m['peft']}.{text}")


def cells(*values) -> str:
  return f"| {' | '.join(map(str, values))} |"


def line(name: str, entry: dict) -> str:
  """The row of a method."""
  rounds, sample = entry["rounds"], entry["settings"]["sample"]
  of = lambda key: [turn[key] for turn in rounds]
  ratio = lambda suffix: (statistics.median(of(f"pytorch{suffix}"))
                          / statistics.median(of(f"jaxalign{suffix}")))
  each = [turn["pytorch"] / turn["jaxalign"] for turn in rounds]
  product = statistics.median(max(turn["product"].values()) for turn in rounds)

  times, work, rates, shares = [], [], [], []
  for side in ("jaxalign", "pytorch"):
    seconds, flops = of(side), entry["flops"][side]
    rate = 1e-9 * flops / statistics.median(seconds)
    times.append(f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})")
    work.append(f"{1e-12 * flops:.3g}")
    rates.append(f"{rate:.3g}")
    shares.append(f"{100 * rate / product:.0f} %")
  compiled = {True: "yes", False: "no", None: "not tried"}[entry.get("compiled")]
  return cells(
      f"`{name}`", f"{ratio(''):.2f} ({min(each):.2f} to {max(each):.2f})", f"{ratio('_cpu'):.2f}",
      *times, *work, *rates, *shares,
      f"{len(rounds)}{'' if len(rounds) >= ROUNDS else ', too few'}",
      f"{sample['batch']}, {sample['steps']}, {sample['guidance']:g}", compiled,
      f"{max(entry['agreement'].values()):.0e}", f"{statistics.median(of('load')):.1f}")

"""A plain training loop with one line for rana_compile. Killed, it goes on from its last save and ends the same.

python examples/train_loop.py --out run
"""

import checkpoints
import torch
from tiny_run import drawn, options, plan_of_run, text, tiny_model

args = options("Train a tiny model with its adapters on.")
model, windows = tiny_model(), text()
plan = plan_of_run(model, windows[:16].split(4), args.out / "plan.safetensors")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
state = {"step": 0, **checkpoints.load(args.out / "state.safetensors", model, optimizer)}

model.compile(backend="rana", options={"plan": plan, "check_weights": False})  # resumed, weights are not the plan's
model.train()
while state["step"] < args.steps:
    ids = drawn(windows, args.batch, state["step"])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state["step"] += 1
    print(f"step {state['step']} loss {loss.item():.6f}", flush=True)
    if state["step"] % args.save_steps == 0:
        checkpoints.save(args.out / "state.safetensors", model, optimizer, state)

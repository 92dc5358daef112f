"""Training in several processes: each calibrates and trains on data of its own, all get one plan and one model.

torchrun --nproc-per-node 2 examples/train_ddp.py --out run
"""

import checkpoints
import torch
import torch.distributed as dist
from tiny_run import drawn, options, plan_of_run, text, tiny_model
from torch.nn.parallel import DistributedDataParallel

args = options("Train a tiny model with its adapters on, in several processes.")
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
model, windows = tiny_model(), text()
mine = windows[rank::count]
plan = plan_of_run(model, mine[:16].split(4), args.out / "plan.safetensors", dist.group.WORLD, write=rank == 0)
print(f"rank {rank} plan {plan.digest()}", flush=True)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
state = {"step": 0, **checkpoints.load(args.out / "state.safetensors", model, optimizer)}
model.compile(backend="rana", options={"plan": plan, "check_weights": False})  # before DDP
parallel = DistributedDataParallel(model).train()
while state["step"] < args.steps:
    ids = drawn(mine, args.batch, state["step"])
    loss = parallel(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state["step"] += 1
    dist.all_reduce(total := loss.detach() / count)
    if rank == 0:
        print(f"step {state['step']} loss {total.item():.6f}", flush=True)
        if state["step"] % args.save_steps == 0:
            checkpoints.save(args.out / "state.safetensors", model, optimizer, state)
weights = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
print(f"rank {rank} weights {weights.item():.9f}", flush=True)
dist.barrier()
dist.destroy_process_group()

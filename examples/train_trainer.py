"""A ``transformers.Trainer`` script with one line for rana_compile; it resumes, saves and loads as ever.

python examples/train_trainer.py --out run
"""

from tiny_run import options, plan_of_run, text, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

args = options("Train a tiny model with its adapters on, by the Trainer.")
model, windows = tiny_model(), text()
plan = plan_of_run(model, windows[:16].split(4), args.out / "plan.safetensors")
training = TrainingArguments(
    output_dir=str(args.out),
    max_steps=args.steps,
    save_steps=args.save_steps,
    per_device_train_batch_size=args.batch,
    learning_rate=1e-3,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
)
model.config.use_cache = False
model.compile(backend="rana", options={"plan": plan, "check_weights": False})  # resumed, weights are not the plan's
data = [{"input_ids": window, "labels": window} for window in windows]
trainer = Trainer(model=model, args=training, train_dataset=data)
result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.out)))
trainer.save_model(str(args.out / "final"))
loaded = AutoModelForCausalLM.from_pretrained(args.out / "final")
assert list(loaded.state_dict()) == list(model.state_dict())
print(f"step {result.global_step} loss {trainer.state.log_history[-2]['loss']:.6f}", flush=True)

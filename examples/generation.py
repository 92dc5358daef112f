"""Text generation with a causal language model, as in transformers' documentation, with one line added."""

import logging

from tiny_models import build, random_tokens

logging.basicConfig(level=logging.INFO, format="%(message)s")

model, _ = build("Llama")
model.compile(backend="rana", options={"calibration_tokens": 256})  # the line; without options: 8,192 tokens

for step in range(8):
    prompt = random_tokens(batch=1, length=48, seed=step)
    output = model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape), max_new_tokens=8, do_sample=False)
    print("generated", output[0, prompt.shape[1] :].tolist())

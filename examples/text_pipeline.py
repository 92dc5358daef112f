"""A text-generation pipeline, as in transformers' documentation, with one line added."""

import logging

from tiny_models import build, byte_tokenizer
from transformers import pipeline

logging.basicConfig(level=logging.INFO, format="%(message)s")

model, _ = build("Qwen 3")
generator = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
generator.model.compile(backend="rana", options={"calibration_tokens": 256})  # the line

for subject in ("the weather", "a short walk", "the old house", "two rivers", "a long winter", "music"):
    (result,) = generator(f"Write a few words about {subject}, please:", max_new_tokens=8, do_sample=False)
    print(repr(result["generated_text"]))

"""Masked language modelling, as in transformers' documentation, with one line added."""

import logging

import torch
from tiny_models import build, byte_tokenizer

logging.basicConfig(level=logging.INFO, format="%(message)s")

tokenizer = byte_tokenizer()
model, _ = build("BERT")
model.compile(backend="rana", options={"calibration_tokens": 256})  # the line

for text in ("The capital of France is [MASK].", "A cat is an [MASK].", "Water boils at one hundred [MASK].") * 4:
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    position = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero()[0, 1]
    print(f"{text} -> {tokenizer.decode(logits[0, position].argmax())!r}")

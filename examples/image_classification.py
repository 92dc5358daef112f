"""Image classification, as in transformers' documentation, with one line added."""

import logging

import torch
from tiny_models import build

logging.basicConfig(level=logging.INFO, format="%(message)s")

model, _ = build("ViT")
model.compile(backend="rana", options={"calibration_tokens": 256})  # the line

images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for batch in images.split(2):
    pixel_values = (batch - 0.5) / 0.5  # as the image processor normalises
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits
    print("classes", logits.argmax(-1).tolist())

"""Speech recognition, as in transformers' documentation, with one line added."""

import logging

import torch
from tiny_models import build
from transformers import WhisperFeatureExtractor

logging.basicConfig(level=logging.INFO, format="%(message)s")

extract = WhisperFeatureExtractor(feature_size=16, chunk_length=0.4, sampling_rate=16_000)
model, _ = build("Whisper")
model.compile(backend="rana", options={"calibration_tokens": 256, "max_divergence": 1.0})  # the line

for step in range(6):
    sound = torch.randn(6_400, generator=torch.Generator().manual_seed(step)).numpy()
    features = extract(sound, sampling_rate=16_000, return_tensors="pt").input_features
    start = torch.full((1, 48), 1)
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=start).logits
    tokens = model.generate(features, max_new_tokens=8, do_sample=False)
    print("first", logits.argmax(-1)[0, :4].tolist(), "heard", tokens[0].tolist())

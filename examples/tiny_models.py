"""Tiny models with random weights, one per architecture: for tests, examples and the table of architectures.

Nothing is downloaded: each is built from its configuration. A model is a name in ``MODELS``; ``build`` makes it with
inputs to call it with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rana_compile import Plan
from rana_compile.adapters.base import weighed

VOCABULARY = 128
HIDDEN, MLP, HEADS, KV_HEADS = 64, 96, 4, 2


@dataclass(frozen=True)
class Tiny:
    """One architecture.

    Attributes:
        make: builds the model with a number of layers, in evaluation mode, reproducibly.
        inputs: from a batch size and a length to keyword arguments of its forward pass (``length`` is the number of
            tokens where the architecture leaves it open).
        generates: whether ``generate`` works on it.
    """

    make: Callable[[int], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    generates: bool = False


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def spread(model: nn.Module) -> nn.Module:
    """Weights that let every layer show in the output (fresh ones are too small to), and no end of text."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5, generator=generator)
            elif p.dim() > 2:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # type: ignore[union-attr, assignment]
        model.generation_config.pad_token_id = 0  # type: ignore[union-attr, assignment]
    return model.eval()


def _text(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": random_tokens(batch, length)}


def _image(batch: int, length: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _speech(batch: int, length: int) -> dict[str, Any]:
    features = torch.randn(batch, 16, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": random_tokens(batch, length)}


def _hidden(batch: int, length: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(1))}


def _transformers(name: str, *layer_keys: str, **settings: Any) -> Callable[[int], nn.Module]:
    """A model class of transformers with random weights: common sizes, with an architecture's own on top."""

    def make(layers: int) -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        sizes |= dict.fromkeys(layer_keys or ("num_hidden_layers",), layers)
        config = model_class.config_class(**(sizes | settings))
        torch.manual_seed(0)
        return spread(model_class(config))

    return make


def _causal(name: str, *layer_keys: str, **settings: Any) -> Tiny:
    return Tiny(_transformers(name, *layer_keys, **settings), _text, generates=True)


_GROUPED: Mapping[str, Any] = {"num_key_value_heads": KV_HEADS}
_GEMMA: Mapping[str, Any] = {**_GROUPED, "head_dim": 16}
_GPT2: Mapping[str, Any] = {"n_embd": HIDDEN, "n_head": HEADS, "n_inner": MLP, "n_positions": 512}
_WHISPER: Mapping[str, Any] = {
    "d_model": HIDDEN,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": MLP,
    "decoder_ffn_dim": MLP,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 256,
    "decoder_start_token_id": 1,
}


class SequenceLabeller(nn.Module):
    """What people write by hand: ``nn.TransformerEncoder`` and a head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, MLP, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class FusedAttention(nn.Module):
    """Attention as timm writes it: one linear gives q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(HIDDEN), FusedAttention(), nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, MLP), nn.GELU(), nn.Dropout(0.1), nn.Linear(MLP, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedVision(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(VisionBlock() for _ in range(layers))), nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def _seeded(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    def seeded(layers: int) -> nn.Module:
        torch.manual_seed(0)
        return spread(make(layers))

    return seeded


MODELS: Mapping[str, Tiny] = {
    "Llama": _causal("LlamaForCausalLM", **_GROUPED),
    "Mistral": _causal("MistralForCausalLM", **_GROUPED, sliding_window=16),
    "Qwen 2": _causal("Qwen2ForCausalLM", **_GROUPED),
    "Qwen 3": _causal("Qwen3ForCausalLM", **_GEMMA),
    "Gemma": _causal("GemmaForCausalLM", **_GEMMA),
    "Gemma 2": _causal("Gemma2ForCausalLM", **_GEMMA, sliding_window=16),
    "Gemma 3": _causal("Gemma3ForCausalLM", **_GEMMA, sliding_window=16),
    "Phi-3": _causal("Phi3ForCausalLM", **_GROUPED),
    "GPT-NeoX (Pythia)": _causal("GPTNeoXForCausalLM"),
    "GPT-2": _causal("GPT2LMHeadModel", "n_layer", **_GPT2),
    "OPT": _causal("OPTForCausalLM", ffn_dim=MLP, word_embed_proj_dim=HIDDEN),
    "Falcon": _causal("FalconForCausalLM", ffn_hidden_size=MLP),
    "Mixtral (experts)": _causal("MixtralForCausalLM", **_GROUPED, num_local_experts=4),
    "Qwen 2 MoE (experts)": _causal(
        "Qwen2MoeForCausalLM", **_GROUPED, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=MLP
    ),
    "BERT": Tiny(_transformers("BertForMaskedLM"), _text),
    "MiniLM (sentence encoder)": Tiny(_transformers("BertModel"), _text),
    "ViT": Tiny(_transformers("ViTForImageClassification", image_size=32, patch_size=8, num_labels=10), _image),
    "Whisper": Tiny(
        _transformers("WhisperForConditionalGeneration", "encoder_layers", "decoder_layers", **_WHISPER),
        _speech,
        generates=True,
    ),
    "nn.TransformerEncoder": Tiny(_seeded(SequenceLabeller), _hidden),
    "timm-style fused qkv": Tiny(_seeded(FusedVision), _hidden),
}


def build(name: str, layers: int = 2) -> tuple[nn.Module, Callable[[int, int], dict[str, Any]]]:
    """(model, inputs) of an architecture by its name in ``MODELS``."""
    tiny = MODELS[name]
    return tiny.make(layers), tiny.inputs


def byte_tokenizer() -> Any:
    """A tokenizer of single characters that fits ``VOCABULARY``, with ``[MASK]``."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
    characters = [chr(c) for c in range(32, 127)]
    words = models.WordLevel({word: i for i, word in enumerate(special + characters)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", mask_token="[MASK]"
    )


def mask_by_hooks(model: nn.Module, plan: Plan) -> list[RemovableHandle]:
    """Give the model's linears masked inputs, by hooks: what a plan of neuron adapters means, without a compiler."""
    hooks = []
    for entry in plan.adapted:
        assert entry.family == "neuron"
        for i, name in enumerate(entry.site.weights):
            linear = model.get_submodule(name.rpartition(".")[0])
            hooks.append(linear.register_forward_pre_hook(_masking(*(t[i : i + 1] for t in entry.tensors.values()))))
    return hooks


def _masking(threshold: Tensor, probe: Tensor) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def masked(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        return x * (weighed(x, x, probe).abs() >= threshold[0])

    return masked

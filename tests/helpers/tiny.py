"""A tiny Llama and a real byte-level BPE tokenizer, built on the spot: nothing to download, a second to train."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.model.adapters import LoadedModel
from raylora.model.loading import load_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The following are multiple choice questions (with answers) about high school geography.",
    "What is the capital of France? Answer: A. Paris B. London C. Rome D. Madrid",
    "Plants use light to make sugar from water and carbon dioxide, and give off oxygen.",
    "A triangle has three sides and three angles whose sum is 180 degrees.",
    "Water boils at 100 degrees at sea level and freezes at 0 degrees.",
    "user assistant system question answer which of these is the colour of the sky?",
)


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """About 500 entries, ChatML template, every byte encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def make_model(seed: int = 0, hidden_size: int = 64, num_layers: int = 2) -> LlamaForCausalLM:
    """A Llama of random weights in float32, about 0.2 million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(LlamaConfig, hidden_size, num_layers)).eval()


def tiny_config(kind: type[PretrainedConfig], hidden_size: int = 64, num_layers: int = 2) -> PretrainedConfig:
    """The sizes of a tiny model, as the configuration of a family, its output head tied to its embeddings."""
    return kind(
        vocab_size=len(make_tokenizer()),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_loaded() -> LoadedModel:
    """The tiny model as raylora holds it, without an adapter."""
    return LoadedModel(make_model().requires_grad_(False), make_tokenizer(), "tiny", "none")


class RoutedMLP(torch.nn.Module):
    """Two experts, each of which gets the tokens whose first number has its sign: x (..., width), the result too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        out = torch.zeros_like(flat)
        for is_positive, expert in zip((True, False), self.experts, strict=True):
            places = ((flat[:, 0] > 0) == is_positive).nonzero()[:, 0]
            out = out.index_add(0, places, expert(flat[places]))
        return out.view_as(x)


def make_routed() -> LoadedModel:
    """The tiny model with experts, ``experts.0`` and ``experts.1``, in place of its MLPs."""
    loaded = make_loaded()
    torch.manual_seed(2)
    for layer in loaded.model.model.layers:
        layer.mlp = RoutedMLP(64).requires_grad_(False)
    return loaded


def save_model(folder: Path, **kwargs: int) -> Path:
    """The tiny model and its tokenizer as a model folder."""
    make_model(**kwargs).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_model_with_outliers(folder: Path) -> Path:
    """The same, with columns in its hidden states above 6, where LLM.int8 begins to call them outlying.

    Which columns those are depends on the token, so that rows of a minibatch have different ones.
    """
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str, **options: bool) -> LoadedModel:
    """A model folder, on the CPU."""
    return load_model(ModelOptions(model=str(folder), quantization=quantization, **options), torch.device("cpu"))


def save_adapter(model_folder: Path, folder: Path) -> Path:
    """A LoRA of random weights for the model folder, as ``folder``."""
    loaded = load_model(ModelOptions(model=str(model_folder), quantization="none"))
    with torch.no_grad():
        for i, p in enumerate(loaded.attach(Method(lora_dropout=0.0), 0)):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    loaded.save_adapter(folder)
    return folder

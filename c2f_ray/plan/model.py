"""What a model's config.json says of its size. No weight is read, and neither torch nor transformers is imported."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2f_ray.errors import RecipeError

# model_type of the decoders that are made of these parts, and whether their q, k and v have biases, or q and k norms.
KNOWN = {
    "llama": (False, False),
    "mistral": (False, False),
    "mixtral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated feed-forward layers, in a mixture of experts where there are several."""

    layers: int
    hidden: int
    intermediate: int  # of one expert
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    experts: int = 1
    experts_per_token: int = 1
    tied: bool = False  # the output layer is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        biases = (queries + 2 * keys) * self.qkv_bias + 2 * self.head_size * self.qk_norm
        return 2 * self.hidden * (queries + keys) + biases

    @property
    def feed_forward(self) -> int:
        """Parameters of one expert of one layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def router(self) -> int:
        return self.hidden * self.experts if self.experts > 1 else 0

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def trunk(self) -> int:
        """Parameters of the model without its output layer, embedding included."""
        layer = self.attention + self.experts * self.feed_forward + self.router + 2 * self.hidden
        return self.embedding + self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        return self.trunk + (0 if self.tied else self.embedding)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: those of its own experts, and not the embedding."""
        return self.layers * (self.attention + self.experts_per_token * self.feed_forward + self.router)

    @property
    def kv_elements(self) -> int:
        """Keys and values that one token leaves in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def forward_flops(self, tokens: float, length: float, *, head: bool) -> float:
        """Of ``tokens`` in sequences of ``length``: 2 for each parameter and token, and attention over the half of
        all pairs that a causal model looks at (arXiv 2204.02311, appendix B). ``head``: with the output layer.
        """
        pairs = 4 * self.layers * self.heads * self.head_size * length / 2
        return tokens * (2 * (self.active + head * self.embedding) + pairs)


MISTRAL_7B = ModelShape(32, 4096, 14336, 32, 8, 128, 32000)
MIXTRAL_8X7B = ModelShape(32, 4096, 14336, 32, 8, 128, 32000, experts=8, experts_per_token=2)
# From the config.json that is published with each. Merlinite's is its base's but for a few more tokens.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "ibm/merlinite-7b": MISTRAL_7B,
    "openbmb/UltraRM-13b": ModelShape(40, 5120, 13824, 40, 40, 128, 32000),
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL_8X7B,
}


def read_model(key: str, model: str) -> ModelShape:
    """The shape of the model in a folder, in the hub's cache, or among those that the shipped recipes name.

    Raises RecipeError naming the dotted ``key``. Fetches nothing.
    """
    where = f"{key}: {model}"
    file = Path(model) / "config.json"
    if not file.is_file():
        if model in PUBLISHED:
            return PUBLISHED[model]
        file = _cached(model)
    if file is None:
        raise RecipeError(
            f"{where}: no config.json there, nor in the hub's cache; give a model folder (for the demo's models run "
            f"make demo first), or fetch it: hf download {model} config.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _shape(where, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{where}: {file} is not a model's configuration ({error!r}); copy it again") from None


def _cached(model: str) -> Path | None:
    if model.count("/") != 1 or model.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else None


def _shape(where: str, config: dict[str, Any]) -> ModelShape:
    kind = config["model_type"]
    if kind not in KNOWN and config.get("architectures") != ["LlamaRewardModel"]:
        raise RecipeError(f"{where}: plan does not know models of type {kind!r}; it knows {', '.join(KNOWN)}")
    qkv_bias, qk_norm = KNOWN.get(kind, (False, False))
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        experts=config.get("num_local_experts", 1) if kind == "mixtral" else 1,
        experts_per_token=config.get("num_experts_per_tok", 1) if kind == "mixtral" else 1,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )

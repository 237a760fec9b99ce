"""The shape of a model: pure data, no torch. Presets are files: configs/model/*.yaml."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""How pydantic checks every section of a configuration: no key that is not known, no number that is none."""


@dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Maximal update parametrization: what was tuned at a base width serves every width (not every depth).

    With m = hidden_size / base_hidden_size, and d the width of a head:

        |                     | matrices inside layers | embedding | head       | biases, norms |
        | initial variance    | 1 / fan_in             | the base's| the base's | 0 and 1       |
        | times in the output | 1                      | 1         | 1 / m      | 1             |
        | Adam's rate         | rate / m               | rate      | rate       | rate          |

    and queries meet keys at sqrt(base_head_dim) / d, in place of 1 / sqrt(d). At the base width all of it is the
    standard parametrization. A matrix decays by the same part of itself as in that one: its rate alone is divided.
    mlp_size and heads x head_size must grow with hidden_size, since they are the fan-ins of the branches' outputs. Tied
    embeddings keep to the table: variance and rate are the same for both, and 1 / m stands in the output alone.

    Source: Yang et al. 2022, arXiv 2203.03466, table 8, and definition 4.1 for attention; without the zero initial
    queries and head that it recommends beside.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    base_hidden_size: Annotated[int, Field(ge=1, description="the hidden_size of the model that was tuned")]
    base_head_dim: Annotated[int, Field(ge=1, description="the width of its heads")]


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Frequencies divided by `factor`: a longer text in the angles of a shorter one.

    Source: Chen et al. 2023, arXiv 2306.15595.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["linear"]
    factor: Annotated[float, Field(ge=1, description="what every rotary frequency is divided by")]


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Frequencies that turn seldom in the original length divided by `factor`, those that turn often as they were.

    A frequency f turns n = original_max_position_embeddings x f / 2 pi times in the original length. With
    s = (n - low_freq_factor) / (high_freq_factor - low_freq_factor), at least 0 and at most 1, it becomes
    s f + (1 - s) f / factor. Source: the rotary embedding of Llama 3.1, as transformers computes it (rope type llama3).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1, description="what the lowest rotary frequencies are divided by")]
    low_freq_factor: Annotated[float, Field(gt=0, description="the turns up to which a frequency is divided by factor")]
    high_freq_factor: Annotated[float, Field(gt=0, description="the turns from which a frequency stays")]
    original_max_position_embeddings: Annotated[int, Field(ge=1, description="the length before it was stretched")]


RopeScaling = Annotated[LinearRope | Llama3Rope, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    form gpt_neox: LayerNorm, biases, attention and MLP in parallel on one residual, rotary on part of a head, GELU.
    form llama: RMSNorm, no biases, attention then MLP, rotary on the whole head, SwiGLU, grouped key/value heads.
    What a form has of biases and residuals is where it starts from: models of others differ in them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    form: Annotated[Literal["gpt_neox", "llama"], Field(description="the family of the decoder block")] = "gpt_neox"
    vocab_size: Annotated[int, Field(ge=2, description="the number of rows of the embedding, padding included")]
    hidden_size: Annotated[int, Field(ge=2, description="the width of the residual stream")]
    num_layers: Annotated[int, Field(ge=1, description="the number of decoder blocks")]
    num_attention_heads: Annotated[int, Field(ge=1, description="the number of query heads")]
    num_kv_heads: Annotated[
        int | None, Field(ge=1, description="the number of key/value heads; as many as query heads if null")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=2, description="the width of a head; hidden_size / num_attention_heads if null")
    ] = None
    intermediate_size: Annotated[
        int | None, Field(ge=1, description="the width inside the MLP; 4 x hidden_size if null")
    ] = None
    rotary_pct: Annotated[
        float | None, Field(gt=0, le=1, description="the part of a head that is rotated; 0.25 (gpt_neox) or 1 if null")
    ] = None
    rope_theta: Annotated[float, Field(gt=0, description="the base of the rotary frequencies")] = 10000.0
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies were stretched for longer texts; null: not at all."""
    norm_eps: Annotated[float, Field(gt=0, description="the epsilon inside LayerNorm or RMSNorm")] = 1e-5
    tie_embeddings: Annotated[bool, Field(description="whether the output layer is the embedding itself")] = False
    qk_norm: Annotated[
        Literal["none", "layer_norm", "rms_norm"], Field(description="the norm of each head's queries and keys")
    ] = "none"
    attention_bias: Annotated[
        Literal["none", "qkv", "all"] | None,
        Field(description="which of attention's products have a bias; all (gpt_neox) or none (llama) if null"),
    ] = None
    mlp_bias: Annotated[
        bool | None, Field(description="whether the MLP's products have a bias; true (gpt_neox) or false if null")
    ] = None
    parallel_residual: Annotated[
        bool | None,
        Field(description="whether the MLP reads what attention reads; true (gpt_neox) or false, after it, if null"),
    ] = None
    gelu: Annotated[
        Literal["exact", "tanh"], Field(description="how the gpt_neox form computes GELU: by erf, or nearly so by tanh")
    ] = "exact"
    mup: MupConfig | None = None
    """Null: the standard parametrization."""

    @property
    def head_size(self) -> int:
        """Width of one attention head: head_dim, or hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: num_kv_heads, or as many as query heads."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Width inside the MLP: intermediate_size, or 4 x hidden_size."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; value heads are as wide."""
        return self.kv_heads * self.head_size

    @property
    def qkv_biased(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.form == "gpt_neox" if self.attention_bias is None else self.attention_bias != "none"

    @property
    def attention_out_biased(self) -> bool:
        """Whether attention's output has a bias."""
        return self.form == "gpt_neox" if self.attention_bias is None else self.attention_bias == "all"

    @property
    def mlp_biased(self) -> bool:
        """Whether the products of the MLP have a bias."""
        return self.form == "gpt_neox" if self.mlp_bias is None else self.mlp_bias

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP stand side by side on one residual, rather than one after the other."""
        return self.form == "gpt_neox" if self.parallel_residual is None else self.parallel_residual

    @property
    def width_ratio(self) -> float:
        """m of `MupConfig`: how much wider the model is than the one that was tuned; 1 without muP."""
        return self.hidden_size / self.mup.base_hidden_size if self.mup else 1.0

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by: head_size^-0.5 up to the base width of muP."""
        standard: float = self.head_size**-0.5
        return standard * math.sqrt(self.mup.base_head_dim / self.head_size) if self.mup else standard

    @property
    def rotary_dims(self) -> int:
        """How many dimensions of a head are rotated: an even number."""
        part = self.rotary_pct or (0.25 if self.form == "gpt_neox" else 1.0)
        return int(self.head_size * part) // 2 * 2

    @property
    def spelled_out(self) -> "ModelConfig":
        """The same model, with what its form says in place of null."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            intermediate_size=self.mlp_size,
            rotary_pct=self.rotary_pct or (0.25 if self.form == "gpt_neox" else 1.0),
            attention_bias="all" if self.attention_out_biased else "qkv" if self.qkv_biased else "none",
            mlp_bias=self.mlp_biased,
            parallel_residual=self.parallel,
        )

    def problem(self) -> str | None:
        """What does not fit together in this model, as "key is ...; it must ...", or None."""
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            return (
                f"num_attention_heads is {self.num_attention_heads}; it must divide hidden_size, {self.hidden_size}, "
                "where head_dim is not given"
            )
        if self.num_attention_heads % self.kv_heads:
            return f"num_kv_heads is {self.kv_heads}; it must divide num_attention_heads, {self.num_attention_heads}"
        if self.form == "gpt_neox" and self.kv_heads != self.num_attention_heads:
            return f"num_kv_heads is {self.kv_heads}; the gpt_neox form has as many as num_attention_heads"
        if self.rotary_dims < 2:
            return f"rotary_pct leaves no dimension of a head of {self.head_size} to rotate; it must leave two"
        if self.form == "llama" and self.gelu != "exact":
            return f"gelu is {self.gelu}; it must be left out, since the llama form has SwiGLU"
        rope = self.rope_scaling
        if isinstance(rope, Llama3Rope) and rope.low_freq_factor >= rope.high_freq_factor:
            return (
                f"rope_scaling.low_freq_factor is {rope.low_freq_factor:g}; it must be less than high_freq_factor, "
                f"{rope.high_freq_factor:g}"
            )
        return None

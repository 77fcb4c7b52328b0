"""A family of Hugging Face models: how its `config.json` is read, and how its tensors are named."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pikv_megatron.checkpoint.families.fields import ConfigFields

if TYPE_CHECKING:
    from pikv_megatron.checkpoint.architecture import Architecture


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class TensorNames:
    """Names behind `model.layers.N.`, each as released and as newer releases may write it.

    Attributes:
        block: prefix of an MoE layer's tensors as released; newer ones write `mlp.`.
        router: the router's weight, behind `block` and behind `mlp.`.
        expert_bias: what is added to the scores that experts are chosen by, likewise.
        shared: prefix of the shared experts, likewise.
        shared_gate: weight of their gate, the same in both.
        expert: an expert's gate, up and down projections.
        has_stacked_experts: whether the experts of a layer are one tensor always, transposed, in
            which gate and up take turns.
    """

    block: str = "mlp."
    router: tuple[str, str] = ("gate.weight", "gate.weight")
    expert_bias: tuple[str, str] = ("", "")
    shared: tuple[str, str] = ("shared_experts.", "shared_experts.")
    shared_gate: str = ""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    has_stacked_experts: bool = False


class Family(ABC):
    """What a `config.json` means. One file a family; the methods give fields of `Architecture`.

    Attributes:
        name: `model_type`.
        class_name: of the model, in `architectures`.
        defaults: of fields that a file may leave out, as transformers fills them in.
        other_names: of models of the same shape, in either field.
        is_latent: whether heads share a latent, and have no groups and no width of their own.
        rotary_base: where neither of a file's spellings gives it.
        has_partial_rotary: whether the family rotates a part of each head.
        has_prediction_layers: whether layers behind the last one, for predicting several tokens at
            once, may be among the tensors; they are left out.
        names: of its tensors.
    """

    name: ClassVar[str]
    class_name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    other_names: ClassVar[tuple[str, ...]] = ()
    is_latent: ClassVar[bool] = False
    rotary_base: ClassVar[float] = 1e4
    has_partial_rotary: ClassVar[bool] = False
    has_prediction_layers: ClassVar[bool] = False
    names: ClassVar[TensorNames] = TensorNames()

    @abstractmethod
    def attention(self, fields: ConfigFields) -> dict[str, Any]:
        """Norms, biases and clipping of queries, keys and values."""

    @abstractmethod
    def experts(self, fields: ConfigFields) -> dict[str, Any]:
        """The router, the experts and the dense layers."""

    def refuse_unsupported(self, fields: ConfigFields) -> None:
        """Look for what this family alone can ask for.

        Raises:
            ValueError: naming it.
        """

    @abstractmethod
    def write(self, architecture: "Architecture") -> dict[str, Any]:
        """Fields of `config.json` that are this family's own."""


def attention_biases(fields: ConfigFields) -> dict[str, bool]:
    """One field for the biases of all four projections."""
    has_bias = fields.flag("attention_bias")
    return {"qkv_bias": has_bias, "attention_output_bias": has_bias}


def softmax_router(fields: ConfigFields) -> dict[str, Any]:
    """A softmax over the chosen experts, or over all of them."""
    return {
        "moe_router_topk": fields.integer("num_experts_per_tok"),
        "moe_router_pre_softmax": not fields.flag("norm_topk_prob"),
    }


def sigmoid_router(fields: ConfigFields, scaling_factor: str | None = None) -> dict[str, Any]:
    """Sigmoid scores, chosen by with a bias, normalised and scaled.

    Args:
        fields: the file's.
        scaling_factor: the field that has it.
    """
    return {
        "moe_router_topk": fields.integer("num_experts_per_tok"),
        "moe_router_score_function": "sigmoid",
        "moe_router_expert_bias": True,
        "moe_router_topk_scaling_factor": fields.number(scaling_factor) if scaling_factor else None,
    }


def expert_groups(fields: ConfigFields, best: int = 2) -> dict[str, int | None]:
    """Groups of experts, of which a token chooses some by the sum of their `best` best experts."""
    groups, chosen = fields.integer("n_group"), fields.integer("topk_group")
    if groups == 1:
        return {}
    return {
        "moe_router_num_groups": groups, "moe_router_group_topk": chosen,
        "moe_router_group_judges": best,
    }


def listed_dense_layers(fields: ConfigFields) -> dict[str, Any]:
    """Layers that `mlp_layer_types` calls dense; without it, the first one.

    Raises:
        ValueError: it does not name a kind for every layer.
    """
    kinds, count = fields.get("mlp_layer_types"), fields.integer("num_hidden_layers")
    if kinds is None:
        dense = (0,)
    elif not isinstance(kinds, list) or len(kinds) != count or {*kinds} - {"dense", "sparse"}:
        raise ValueError(
            f"mlp_layer_types = {kinds!r}: expected 'dense' or 'sparse' for each of {count} layers"
        )
    else:
        dense = tuple(layer for layer, kind in enumerate(kinds) if kind == "dense")
    return {
        "dense_layers": dense,
        "ffn_hidden_size": fields.integer("intermediate_size") if dense else None,
    }


def leading_dense_layers(fields: ConfigFields) -> dict[str, Any]:
    """The first layers are dense."""
    count = fields.integer("first_k_dense_replace", least=0)
    dense = tuple(range(min(count, fields.integer("num_hidden_layers"))))
    return {
        "dense_layers": dense,
        "ffn_hidden_size": fields.integer("intermediate_size") if dense else None,
    }


def sliding_layers(
    fields: ConfigFields, is_sliding: Callable[[int], bool] = lambda layer: True
) -> dict[str, Any]:
    """The layers whose queries see a sliding window; one as wide as the context changes nothing.

    Args:
        fields: the file's.
        is_sliding: of a layer, where `layer_types` does not say it.

    Raises:
        ValueError: a layer is of a kind that is not supported.
    """
    count, kinds = fields.integer("num_hidden_layers"), fields.get("layer_types")
    if kinds is not None:
        _check_kinds(kinds, count)
        chosen = tuple(layer for layer in range(count) if kinds[layer] == SLIDING)
    else:
        chosen = tuple(layer for layer in range(count) if is_sliding(layer))
    if fields.get("sliding_window") in (None, 0) or not chosen:
        return {}
    window = fields.integer("sliding_window")
    if window >= fields.integer("max_position_embeddings"):
        return {}
    return {"sliding_window": window, "sliding_layers": chosen}


def written_widths(architecture: "Architecture") -> dict[str, int]:
    """Widths of the experts and of dense layers, where a `config.json` tells them apart."""
    width = architecture.moe_ffn_hidden_size
    return {
        "moe_intermediate_size": width,
        "intermediate_size": architecture.ffn_hidden_size or width,
    }


def written_stepped_experts(architecture: "Architecture") -> dict[str, Any]:
    """What `softmax_router` and `stepped_dense_layers` read, and the window, as Qwen has them."""
    return {
        "num_experts": architecture.num_experts,
        **written_widths(architecture),
        "norm_topk_prob": not architecture.moe_router_pre_softmax,
        "mlp_only_layers": list(architecture.dense_layers),
        "decoder_sparse_step": 1,
        "use_sliding_window": architecture.sliding_window is not None,
        "sliding_window": architecture.sliding_window,
    }


def written_mlp_layer_types(architecture: "Architecture") -> list[str]:
    """What `listed_dense_layers` reads."""
    return ["sparse" if is_moe else "dense" for is_moe in architecture.is_moe_layer]


def written_layer_types(architecture: "Architecture") -> list[str]:
    """`layer_types` of a `config.json`."""
    layers = range(architecture.num_layers)
    return [SLIDING if layer in architecture.sliding_layers else FULL for layer in layers]


def _check_kinds(kinds: Any, count: int) -> None:
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ValueError(f"layer_types = {kinds!r}: expected a kind for each of {count} layers")
    other = next((kind for kind in kinds if kind not in (SLIDING, FULL)), None)
    if other is not None:
        raise ValueError(
            f"layer_types holds {other!r}, which is not supported: only {SLIDING!r} and {FULL!r} "
            "are"
        )


def stepped_dense_layers(fields: ConfigFields) -> dict[str, Any]:
    """Dense layers that are listed, or lie between every n-th one."""
    step, listed = fields.integer("decoder_sparse_step"), fields.integers("mlp_only_layers")
    layers = range(fields.integer("num_hidden_layers"))
    dense = tuple(layer for layer in layers if layer in listed or (layer + 1) % step)
    return {
        "dense_layers": dense,
        "ffn_hidden_size": fields.integer("intermediate_size") if dense else None,
    }

"""ML-Decoder: a multi-label classifier with class queries that attend to the tokens.

Axes: B images, L tokens (prefix and kept patches), D their width, E that of the decoder, C classes,
G queries. The names of the weights are the published ones.
"""

import inspect
from typing import Any, Dict, Literal, Mapping, Optional, Tuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Head = Literal["ml_decoder"]
HEADS: Tuple[str, ...] = get_args(Head)
BY_CLASS = ("query_embed.weight", "duplicate_pooling", "duplicate_pooling_bias")


class MLDecoder(nn.Module):
    """Tokens (B, L, D) -> logits (B, C), by one layer of cross attention.

    Each query stands for one class or a group of classes; queries are random and not trained. The
    number of tokens is free, so it works at any keep ratio.

    Args:
        num_classes: C.
        in_features: D.
        embed_dim: E.
        num_groups: largest G; there are at most as many queries as classes.
        num_heads: attention heads; must divide E.
        mlp_dim: hidden width of the layer.
        drop: dropout rate in training.

    Raises:
        ValueError: A size is below 1, `num_heads` does not divide E, or `drop` is not in [0, 1).

    Source: Ridnik et al. (2023), ML-Decoder: scalable and versatile classification head.

    >>> MLDecoder(80, 384)(torch.randn(2, 99, 384)).shape
    torch.Size([2, 80])
    """

    def __init__(
        self,
        num_classes: int,
        in_features: int,
        embed_dim: int = 768,
        num_groups: int = 100,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self._config = {"embed_dim": embed_dim, "num_groups": num_groups}
        self._config.update(num_heads=num_heads, mlp_dim=mlp_dim)
        sizes = {"num_classes": num_classes, "in_features": in_features, **self._config}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of {num_heads} heads, got {embed_dim}.")
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"drop must be in [0, 1), got {drop}.")
        self.num_classes, self.in_features = num_classes, in_features
        self._drop = drop
        groups = min(num_groups, num_classes)
        self.embed_standart = nn.Linear(in_features, embed_dim)
        self.query_embed = nn.Embedding(groups, embed_dim).requires_grad_(False)
        self.layers = nn.ModuleList([_CrossAttention(embed_dim, num_heads, mlp_dim, drop)])
        in_group = -(-num_classes // groups)
        self.duplicate_pooling = nn.Parameter(torch.empty(groups, embed_dim, in_group))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.duplicate_pooling)

    @torch.jit.ignore
    def config(self) -> Dict[str, Any]:
        """Arguments that rebuild this head, without those that depend on model and data."""
        return {**self._config, "drop": self._drop}

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x (B, L, D) -> logits (B, C)."""
        memory = F.relu(self.embed_standart(x))  # (B, L, E)
        queries = self.query_embed.weight.unsqueeze(0).expand(x.shape[0], -1, -1)  # (B, G, E)
        for layer in self.layers:
            queries = layer(queries, memory)
        logits = torch.einsum("bge,gec->bgc", queries, self.duplicate_pooling).flatten(1)
        return logits[:, : self.num_classes] + self.duplicate_pooling_bias


class _CrossAttention(nn.Module):
    """Queries (B, G, E) attend to memory (B, L, E), not to each other: linear in G."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, drop: float) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(embed_dim, num_heads, drop, batch_first=True)
        self.linear1 = nn.Linear(embed_dim, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(drop)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(queries + self.dropout(queries))  # instead of self attention
        seen = self.multihead_attn(x, memory, memory, need_weights=False)[0]
        x = self.norm2(x + self.dropout(seen))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


def make_head(name: str, backbone: Any, args: Optional[Mapping[str, Any]] = None) -> MLDecoder:
    """A head, one of ``HEADS``, for the classes and tokens of a timm ViT, which is not changed.

    ``args`` are ``embed_dim``, ``num_groups``, ``num_heads``, ``mlp_dim`` and ``drop``. TypeError
    or ValueError if one is unknown or out of range, or if the backbone has no classes.
    """
    if name not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}.")
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"head_args must be a mapping, got {type(args).__name__}.")
    if backbone.num_classes < 1:
        raise ValueError(f"an {name} head needs classes: create the backbone with num_classes=….")
    known = list(inspect.signature(MLDecoder).parameters)[2:]  # classes and width are known
    unknown = [str(key) for key in args or {} if key not in known]
    if unknown:
        raise TypeError(f"head_args may be {', '.join(known)}, got {', '.join(unknown)}.")
    width = getattr(backbone.get_classifier(), "in_features", None)
    if width is None:  # distilled models have two classifiers, each for a token of its own
        kind = type(backbone).__name__
        raise TypeError(f"{kind} cannot have an {name} head: its classifier receives no tokens.")
    parameter = next(backbone.parameters())
    head = MLDecoder(backbone.num_classes, width, **(args or {}))
    return head.to(parameter.device, parameter.dtype).train(backbone.training)

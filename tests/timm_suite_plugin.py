"""A pytest plugin under which timm's own ``tests/test_models.py`` runs over our models.

timm's test file, as released and unmodified, asks ``timm.list_models`` which models each of its
tests runs over, and decides by name which contracts a model is held to: lists that name ``vit_*``
set the token models apart from the CNNs (tokens cannot satisfy the CNN contract), lists of modules
that name ``vision_transformer`` ask for ``forward_intermediates``, ``features_only`` and
``prune_intermediate_layers``.

This plugin, loaded in a subprocess by ``python -m pytest test_models.py -p timm_suite_plugin``,
imports ``ltrp_timm`` and replaces ``timm.list_models`` and ``timm.list_pretrained`` before the test
file is imported:

- where ``filter`` or ``exclude_filters`` names ``vit_*``, ``ltrp*`` is named too;
- where ``module`` names ``vision_transformer``, our module ``ltrp_vit`` is named too;
- of timm's answer, only the models that the environment variable ``LTRP_SUITE_NAMES`` names stay:
  globs with commas between them, matched against the name without its tag.

All else is timm's. So our models are held to what timm holds its ViTs to; no test is changed.
"""

import fnmatch
import os
from typing import Any, Callable, Iterable, List, Union

import pytest
import timm

NAMES_VARIABLE = "LTRP_SUITE_NAMES"

_ALONGSIDE = {"vit_*": "ltrp*", "vision_transformer": "ltrp_vit"}

Patterns = Union[str, Iterable[str]]


def with_ours(patterns: Patterns) -> List[str]:
    """The same patterns, with ours behind them where those of timm's ViTs are among them."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    return listed + [ours for theirs, ours in _ALONGSIDE.items() if theirs in listed]


def suite_list_models(names: Iterable[str]) -> Callable[..., List[str]]:
    """``timm.list_models`` as described above, for the globs in ``names``."""
    list_models, globs = timm.models.list_models, list(names)

    def ours(
        filter: Patterns = "",
        module: Patterns = "",
        pretrained: bool = False,
        exclude_filters: Patterns = "",
        **options: Any,
    ) -> List[str]:
        found = list_models(
            filter=with_ours(filter) if filter else "",
            module=with_ours(module) if module else "",
            pretrained=pretrained,
            exclude_filters=with_ours(exclude_filters) if exclude_filters else "",
            **options,
        )
        archs = [timm.models.get_arch_name(name) for name in found]
        return [
            name
            for name, arch in zip(found, archs)
            if arch.startswith("ltrp") and any(fnmatch.fnmatchcase(arch, glob) for glob in globs)
        ]

    return ours


def pytest_configure(config: pytest.Config) -> None:
    """Replace both functions before the test file is imported and takes them from ``timm``."""
    import ltrp_timm  # noqa: F401  # registers the models

    names = [name.strip() for name in os.environ.get(NAMES_VARIABLE, "").split(",")]
    if not any(names):
        raise pytest.UsageError(f"set {NAMES_VARIABLE} to the registered names to run over.")
    list_models = suite_list_models(names)

    def list_pretrained(filter: Patterns = "", exclude_filters: Patterns = "") -> List[str]:
        return list_models(
            filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True
        )

    timm.list_models, timm.list_pretrained = list_models, list_pretrained

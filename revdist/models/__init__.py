"""Model families built from reversible operators; each contains one chain that `find_chain` finds."""

from revdist.models.glow import Glow, glow
from revdist.models.irevnet import IRevNet, irevnet
from revdist.models.ode_classifier import ODEClassifier, ode_classifier
from revdist.models.reformer import Reformer, reformer, reformer_enwik8
from revdist.models.resnext_inplace_abn import (
    ResNeXtInPlaceABN,
    resnext50_inplace_abn,
    resnext101_inplace_abn,
    resnext_inplace_abn,
)
from revdist.models.revnet import RevNet, revnet38, revnet56, revnet104, revnet110, revnet164, revnet_digits
from revdist.models.revvit import RevViT, revvit, revvit_base, revvit_small

__all__ = [
    "Glow",
    "IRevNet",
    "ODEClassifier",
    "Reformer",
    "ResNeXtInPlaceABN",
    "RevNet",
    "RevViT",
    "glow",
    "irevnet",
    "ode_classifier",
    "reformer",
    "reformer_enwik8",
    "resnext50_inplace_abn",
    "resnext101_inplace_abn",
    "resnext_inplace_abn",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
    "revnet_digits",
    "revvit",
    "revvit_base",
    "revvit_small",
]

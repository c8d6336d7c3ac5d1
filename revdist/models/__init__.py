"""Model families built from reversible operators; each contains one chain that `find_chain` finds."""

from revdist.models.revnet import RevNet, revnet38, revnet56, revnet104, revnet110, revnet164, revnet_digits

__all__ = ["RevNet", "revnet38", "revnet56", "revnet104", "revnet110", "revnet164", "revnet_digits"]

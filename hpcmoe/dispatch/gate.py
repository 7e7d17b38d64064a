"""What a gate computes, by the config alone: known before torch is imported, so that a checkpoint can be checked.

Source of p itself where a token has one expert: Fedus et al. 2021 (arXiv:2101.03961), section 2.1.
"""

from hpcmoe.config import DispatchConfig


def renormalizes(dispatch: DispatchConfig, top_k: int) -> bool:
    """Return True if a token's K gate weights are scaled to sum to 1.

    With one expert that weight would always be 1, and the task would never train the router: it is p itself.
    """
    return dispatch.renormalize and top_k > 1


def load_acts_on_gates(dispatch: DispatchConfig) -> bool:
    """Return True if the measured load acts on the gate weights too, and not on the choice alone."""
    return dispatch.load_feedback_on == "both"

"""Inputs at which an activation's gradient does not depend on how a processor rounds what goes into it."""

import torch

MARGIN = 0.05  # of the mean magnitude: ten times what bfloat16 rounds


def draw_off_kinks(num_rows, weight, bias, generator):
    """Draw rows x [n, in] for which no entry of x weight^T + bias is near zero, where ReLU has its kink."""
    rows = torch.randn(100 * num_rows, weight.shape[1], generator=generator)
    before = rows.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    kept = rows[before.abs().amin(dim=1) > MARGIN * before.abs().mean()]
    assert len(kept) >= num_rows, f"only {len(kept)} of {len(rows)} rows are off the kinks"
    return kept[:num_rows]

"""AdamW's two moments."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""As torch names them."""

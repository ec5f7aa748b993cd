"""Prices of rented GPUs that the plan shows; a GPU without a published price is not in the table."""

PRICES_AS_OF = "typical on-demand prices in the first half of 2026"

DOLLARS_PER_HOUR = {"A100": 1.50, "H100": 3.00, "RTX 4090": 0.60}
"""Assumed price of one GPU, by its name in `job.model.gpu_table`; the A100's is that of the 80 GB one.

They are in the range that was published for on-demand GPUs (mercatus-ai.com/blog/cloud-gpu-pricing, May 2026: A100 80GB
$0.80 to $3.00, H100 $1.99 to $5.00; RunPod: RTX 4090 $0.34 to $0.69).
"""

"""Launch specs for each place (Slurm, Kubernetes, SwanLab, SkyPilot, Docker Compose, Kaggle, Colab) and their tools."""

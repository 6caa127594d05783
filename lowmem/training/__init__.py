"""The Hugging Face side: trainers, arguments, checkpoints, data, models."""

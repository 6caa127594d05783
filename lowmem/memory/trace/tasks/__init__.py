"""Steps of TRL's other trainers, traced: their own losses, on tensors without numbers."""

"""Which rule a tensor follows now: in turn, or by what its gradients were."""

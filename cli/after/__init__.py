"""After the run: merge an adapter, talk to the model, take it elsewhere."""

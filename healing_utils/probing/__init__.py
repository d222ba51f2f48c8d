"""What layers and neurons know: activations, probes, rankings."""

"""Break an encoder and heal it: layers, corruption, recipes, the training loop."""
